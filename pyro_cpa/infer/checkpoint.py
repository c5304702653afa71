# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints from which training resumes bit for bit, and whose loading cannot run code."""

from __future__ import annotations

import copy
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from pyro.optim import PyroOptim
from pyro.params.param_store import ParamStoreDict
from torch import nn

from pyro_cpa.errors import CPAError, InvalidData, UnsupportedModel

__all__ = ["load_checkpoint", "save_checkpoint"]

_FORMAT = "pyro_cpa checkpoint"
_VERSION = 1


def save_checkpoint(path: str | os.PathLike[str], **parts: Any) -> None:
    """Write the state of ``parts`` and of all random number generators to ``path``.

    Args:
        path: file to write; replaced in one move, so that a crash leaves the old file or the new one.
        parts: what to save, each under a name of your choice: modules (``model=``, ``guide=``), optimisers
            and their learning-rate schedulers (Pyro's or torch's), Pyro's parameter store
            (``params=pyro.get_param_store()``, for functions with ``pyro.param``), temperature schedules,
            an :class:`~pyro_cpa.infer.AlternatingTrainer`, an :class:`~pyro_cpa.infer.EM` or
            :class:`~pyro_cpa.infer.ExactML` (in the ``callback=`` of ``run``, say): anything with
            ``state_dict``/``load_state_dict`` or ``get_state``/``set_state``. Bound methods have no state: pass
            the module that owns them.

    Raises:
        UnsupportedModel: for a part without state, or one whose state holds more than tensors, numbers, text
            and containers of them.

    Note:
        Exact: resuming continues with the very numbers of an uninterrupted run on the same machine and versions, as
        far as the data order is a function of what is saved. The generators of torch (all CUDA devices included), NumPy
        and Python are saved. The file is read back before it replaces an older one.

    Example:
        >>> import tempfile, pyro
        >>> net, optim = torch.nn.Linear(2, 1), pyro.optim.Adam({"lr": 0.01})
        >>> path = Path(tempfile.mkdtemp()) / "run.pt"
        >>> save_checkpoint(path, net=net, optim=optim)
        >>> first = torch.rand(3)
        >>> load_checkpoint(path, net=net, optim=optim)
        >>> bool((torch.rand(3) == first).all())
        True
    """
    if not parts:
        raise InvalidData("no part was given; expected for example model=..., guide=..., optim=...")
    path = Path(path)
    content: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "parts": {name: _access(name, part).get() for name, part in parts.items()},
        "random": _random_state(),
    }
    # In the same folder, for os.replace to be atomic; by process, for two writers not to share it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            _write(content, file)
        _check_readable(temporary, content["parts"])
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # make the renaming itself durable where folders can be synchronised
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_checkpoint(path: str | os.PathLike[str], *, random_state: bool = True, **parts: Any) -> None:
    """Restore ``parts``, and the random number generators, from a file of :func:`save_checkpoint`, in place.

    Args:
        path: file to read, with ``weights_only=True``: nothing in it is executed.
        random_state: also restore the generators; False to evaluate a model amid another computation.
        parts: objects of the kinds saved, under the names they were saved with; a selection is allowed.

    Raises:
        InvalidData: for a file that is truncated, damaged or not a checkpoint, for a name it does not hold,
            or for a state that does not fit. The message names the file, and nothing has been changed.
        UnsupportedModel: for a part without state.

    Note:
        Parameters that come into being on the first run (``pyro.param``, automatic guides) must exist: run
        model and guide once before loading; the generators' state comes from the file afterwards.
    """
    path = Path(path)
    content = _read(path)
    saved = content["parts"]
    missing = sorted(set(parts) - set(saved))
    if missing:
        raise InvalidData(f"{path} holds no part {missing[0]!r}; expected one of {', '.join(sorted(saved))}.")
    access = {name: _access(name, part) for name, part in parts.items()}
    before = {name: copy.deepcopy(part.get()) for name, part in access.items()}
    for name, part in access.items():
        try:
            part.set(saved[name])
        except Exception as error:
            for touched in list(access)[: list(access).index(name) + 1]:
                access[touched].set(before[touched])
            raise InvalidData(
                f"part {name!r} of {path} does not fit: {error}. Build it with the arguments of the saved "
                "run, and run model and guide once before loading."
            ) from error
    if random_state:
        _set_random_state(content["random"])


# ---- kinds of parts ------------------------------------------------------------------------------------


class _Access(NamedTuple):
    get: Callable[[], Any]
    set: Callable[[Any], Any]


def _access(name: str, part: Any) -> _Access:
    if isinstance(part, ParamStoreDict):
        return _Access(lambda: _store_state(part), lambda state: _set_store_state(part, state))
    if isinstance(part, PyroOptim):
        return _Access(lambda: _optim_state(name, part), lambda state: _set_optim_state(part, state))
    if hasattr(part, "state_dict") and hasattr(part, "load_state_dict"):
        return _Access(part.state_dict, part.load_state_dict)
    if hasattr(part, "get_state") and hasattr(part, "set_state"):
        return _Access(part.get_state, part.set_state)
    owner = getattr(part, "__self__", None)
    cure = (
        f"Pass the {type(owner).__name__} that owns this method."
        if isinstance(owner, nn.Module)
        else "For a function with pyro.param pass params=pyro.get_param_store()."
    )
    raise UnsupportedModel(
        f"part {name!r} is a {type(part).__name__}; expected an object with state_dict and "
        f"load_state_dict. {cure}"
    )


def _store_state(store: ParamStoreDict) -> dict[str, torch.Tensor]:
    """Unconstrained values; the constraints live in the user's code."""
    return {name: value.detach().clone() for name, value in store.named_parameters()}


def _set_store_state(store: ParamStoreDict, state: Mapping[str, torch.Tensor]) -> None:
    current = dict(store.named_parameters())
    if current.keys() != state.keys():
        different = sorted(current.keys() ^ state.keys())
        raise InvalidData(f"the parameter stores differ in {', '.join(map(repr, different))}")
    for name, value in state.items():
        if value.shape != current[name].shape:
            shapes = f"{tuple(value.shape)} in the file and {tuple(current[name].shape)} here"
            raise InvalidData(f"parameter {name!r} has shape {shapes}")
        with torch.no_grad():
            current[name].copy_(value)


def _optim_state(name: str, optim: PyroOptim) -> dict[str, Any]:
    # A loaded state waits in the optimiser until its parameter is first stepped.
    state = {**optim._state_waiting_to_be_consumed, **optim.get_state()}
    if None in state:
        raise UnsupportedModel(
            f"part {name!r} optimises parameters that have no name in Pyro's parameter store "
            "(module_local_params is on, or the store was cleared); use a torch optimiser over "
            "module.parameters()."
        )
    return state


def _set_optim_state(optim: PyroOptim, state: Mapping[str, Any]) -> None:
    optim.optim_objs.clear()
    optim.grad_clip.clear()
    optim._state_waiting_to_be_consumed.clear()
    optim.set_state(dict(state))


# ---- random number generators --------------------------------------------------------------------------


def _random_state() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {"key": key, "pos": int(numpy_state["state"]["pos"])}},
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = state["numpy"]
    key = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})


# ---- files ---------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:  # a missing file is the system's own error
        try:
            with zipfile.ZipFile(file) as archive:  # torch.load itself does not look at the checksums
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"checksum of {damaged}")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InvalidData(
                f"{path} cannot be read as a checkpoint: it is truncated, damaged, or of another program. "
                "Load an older checkpoint, or the file that save_checkpoint wrote."
            ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise InvalidData(f"{path} is not a {_FORMAT}; expected a file that save_checkpoint wrote.")
    if content.get("version") != _VERSION:
        raise InvalidData(
            f"{path} has format version {content.get('version')}; this release reads version {_VERSION}."
        )
    return content


def _write(content: Mapping[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(content, file)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise _not_plain(content["parts"], error) from error
    file.flush()
    os.fsync(file.fileno())


def _check_readable(path: Path, parts: Mapping[str, Any]) -> None:
    try:
        _read(path)
    except CPAError as error:
        raise _not_plain(parts, error.__cause__) from error


def _not_plain(parts: Mapping[str, Any], error: object) -> UnsupportedModel:
    return UnsupportedModel(
        f"the state of one of {', '.join(parts)} cannot be saved: {error}. A checkpoint holds tensors, "
        "numbers, text and containers of them only."
    )
