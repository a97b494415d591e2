from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from wandapp_kernels.errors import UsageError
from wandapp_kernels.ops import layouts
from wandapp_kernels.ops.layouts import CANONICAL, LAYOUTS, Layout, NMLayout, get_layout, register_layout
from wandapp_kernels.sparsity import BitmapWeight, NMWeight, Pattern


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(layouts, "LAYOUTS", dict(LAYOUTS))
    yield


WEIGHT = torch.tensor([[1.0, 0, 0, 2, 0, 3], [0, 0, 4, 0, 0, 0]])


def test_the_canonical_layouts_hold_the_weight_itself() -> None:
    nm, bitmap = NMWeight.compress(WEIGHT), BitmapWeight.compress(WEIGHT)
    assert get_layout("nm").pack(nm)[0] is nm.values and get_layout("nm").pack(nm)[1] is nm.indices
    for weight, operator in ((nm, "nm_linear"), (bitmap, "bitmap_linear")):
        layout = get_layout(CANONICAL[operator])
        assert layout.operator == operator and layout.supports(weight) is None
        pattern = weight.pattern if isinstance(weight, NMWeight) else None
        tensors = layout.pack(weight)
        unpacked = layout.unpack(tensors, weight.shape, pattern)
        unpacked.validate()
        assert type(unpacked) is type(weight)
        assert torch.equal(layout.decompress(tensors, weight.shape, pattern), WEIGHT)


def test_density_comes_from_sizes() -> None:
    nm, bitmap = NMWeight.compress(WEIGHT), BitmapWeight.compress(WEIGHT)
    assert get_layout("nm").density(get_layout("nm").pack(nm), nm.shape, Pattern.parse("1:4")) == 0.25
    assert get_layout("bitmap").density(get_layout("bitmap").pack(bitmap), bitmap.shape, None) == 4 / 12


def test_the_wrong_kind_of_weight_is_refused() -> None:
    nm, bitmap = NMWeight.compress(WEIGHT), BitmapWeight.compress(WEIGHT)
    with pytest.raises(UsageError, match="holds an NMWeight, not a BitmapWeight"):
        get_layout("nm").pack(bitmap)
    with pytest.raises(UsageError, match="holds a BitmapWeight, not a NMWeight"):
        get_layout("bitmap").pack(nm)
    with pytest.raises(UsageError, match="needs the n:m pattern"):
        get_layout("nm").unpack([nm.values, nm.indices], nm.shape, None)


def test_names_are_unique_and_operators_known() -> None:
    class Other(NMLayout):
        pass

    class Stray(NMLayout):
        name = "stray"
        operator = "conv"

    class Mine(NMLayout):
        name = "mine"

    first: Layout = Mine()
    register_layout(first)
    register_layout(Mine())
    assert get_layout("mine") is first
    with pytest.raises(UsageError, match="'nm' exists already"):
        register_layout(Other())
    with pytest.raises(UsageError, match="'conv'"):
        register_layout(Stray())
    with pytest.raises(UsageError, match=r"'absent' is unknown here \(known: nm, bitmap, .*mine\)"):
        get_layout("absent")
