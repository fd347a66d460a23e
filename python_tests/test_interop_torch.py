"""PyTorch tensors of peculiar kinds: a clear error where there is no kernel; subclasses."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import piece_ops
from piece_ops._arrays import Arrangement


class Wrapper(Tensor):
    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


X = torch.rand(4, generator=torch.Generator().manual_seed(1))
PECULIAR: dict[str, tuple[Callable[[], Tensor], str]] = {
    "sparse": (lambda: X.to_sparse(), "sparse_coo"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr"),
    "mkldnn": (lambda: X.to_mkldnn(), "_mkldnn"),
    "quantized": (lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.quint8), "quantized"),
    "nested": (lambda: torch.nested.nested_tensor([X, X]), "nested"),
    "jagged": (lambda: torch.nested.nested_tensor([X, X], layout=torch.jagged), "NestedTensor"),
    "a wrapper": (lambda: Wrapper(X), "Wrapper"),
    "uninitialized": (torch.nn.UninitializedParameter, "UninitializedParameter"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch on the state of these kinds
@pytest.mark.parametrize("name", PECULIAR)
def test_peculiar_tensors_are_refused(name: str) -> None:
    make, word = PECULIAR[name]
    for call in (
        lambda: piece_ops.select_topk({"w": make()}, 1),
        lambda: piece_ops.gather({"w": make()}, {"w": torch.tensor([0])}),
        lambda: piece_ops.scatter_({"w": make()}, {"w": torch.tensor([0])}, {"w": X[:1]}),
        lambda: piece_ops.gather({"w": X}, {"w": make()}),
    ):
        with pytest.raises(TypeError, match=rf"\['w'\] must be .*, got .*{word}"):
            call()


def test_meta_and_lazily_negated_tensors() -> None:
    with pytest.raises(TypeError, match=r"select_topk: scores must be .*meta"):
        piece_ops.select_topk(X.to("meta"), 1)
    with pytest.raises(ValueError, match=r"total: all tensors must be on one device"):
        piece_ops.total([X, X.to("meta")])
    with pytest.raises(TypeError, match=r"scatter_: targets must be .*resolve_neg"):
        piece_ops.scatter_(torch._neg_view(X), torch.tensor([0]), X[:1])
    assert piece_ops.total(torch._neg_view(X)) == -piece_ops.total(X)


def test_inside_torch_func() -> None:
    with pytest.raises(TypeError, match=r"gather: sources must be .*torch\.func"):
        torch.func.vmap(lambda x: piece_ops.gather(x, torch.tensor([0])))(torch.stack([X, X]))


def test_errors_that_are_nobodys_fault_pass_unchanged() -> None:
    given = Arrangement("gather", "sources", X)
    with pytest.raises(RuntimeError, match=r"^out of memory$"), given.naming_errors():
        raise RuntimeError("out of memory")


def test_subclasses_and_parameters() -> None:
    class Own(Tensor):
        pass

    assert type(piece_ops.select_topk(X.as_subclass(Own), 2).indices) is Own
    parameter = torch.nn.Parameter(X.clone())
    assert not piece_ops.gather([parameter], [np.array([1])])[0].requires_grad
    piece_ops.scatter_(parameter, np.array([1]), np.ones(1, np.float32))
    assert parameter[1] == 1 and parameter.is_leaf and parameter.requires_grad


def test_streams_of_the_cuda_array_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 and 2 are names, not handles; torch makes no stream objects of them (seen on a GPU)."""
    from piece_ops import _dlpack

    said: list[tuple[str, object]] = []
    own = SimpleNamespace(wait_stream=lambda other: said.append(("wait", other)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: own)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: handle)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append(("all", device)))
    for stream in (1, 2, 4711):
        _dlpack._wait_for(stream, torch.device("cuda", 0))
    assert said == [("wait", "default"), ("all", torch.device("cuda", 0)), ("wait", 4711)]
