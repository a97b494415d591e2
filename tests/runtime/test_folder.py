"""Building a model without weights concerns the thread that does it, and no other."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from wandapp_kernels.runtime.folder import _weights_on_meta


def on_meta() -> bool:
    module = nn.BatchNorm1d(3)
    assert not module.running_mean.is_meta and bool((module.running_var == 1).all())
    assert {p.is_meta for p in module.parameters()} == {module.weight.is_meta}
    return module.weight.is_meta


def in_a_thread() -> bool:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(on_meta()))
    thread.start()
    thread.join()
    return found[0]


def test_only_inside_and_also_nested_or_after_an_error() -> None:
    assert not on_meta()
    with _weights_on_meta():
        assert on_meta()
        with _weights_on_meta():
            assert on_meta()
        assert on_meta()
        with pytest.raises(KeyError), _weights_on_meta():
            raise KeyError
        assert on_meta()
    assert not on_meta()
    with pytest.raises(KeyError), _weights_on_meta():
        raise KeyError
    assert not on_meta()


def test_what_a_parameter_is_besides_stays() -> None:
    with _weights_on_meta():
        module = nn.Linear(3, 2, bias=False)
        module.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        module.register_parameter("none", None)
    assert module.none is None and module.frozen.is_meta
    assert module.weight.requires_grad and not module.frozen.requires_grad


def test_other_threads_build_real_modules_meanwhile() -> None:
    with _weights_on_meta():
        assert not in_a_thread()
        assert on_meta()
    assert not in_a_thread()


def test_loads_at_the_same_time() -> None:
    inside, leave = threading.Barrier(2, timeout=20), threading.Event()
    found: dict[str, bool] = {}

    def other() -> None:
        with _weights_on_meta():
            inside.wait()
            leave.wait(20)
            found["inside, after the first has left"] = on_meta()
        found["outside"] = on_meta()

    thread = threading.Thread(target=other)
    thread.start()
    with _weights_on_meta():
        inside.wait()
        assert on_meta()
    assert not on_meta()
    leave.set()
    thread.join()
    assert found == {"inside, after the first has left": True, "outside": False}
