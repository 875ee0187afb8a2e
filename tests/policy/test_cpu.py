"""oneDNN's linear layer is that of torch but for rounding, forward and backward; small models keep theirs."""

import pytest
import torch
from torch import nn

from bcft.policy import cpu


def layers(*, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """Return a layer of torch and the same one with oneDNN's products."""
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias)
    fast = nn.Linear(24, 40, bias=bias)
    fast.load_state_dict(plain.state_dict())
    fast.__class__ = cpu.OneDNNLinear
    return plain, fast


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 24), (24,), (0, 24)])
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    plain, fast = layers(bias=bias)
    x = torch.randn(shape)
    results = []
    for layer in (plain, fast):
        given = x.clone().requires_grad_()
        output = layer(given)
        (output**2).sum().backward()
        results.append((output, given.grad, *(p.grad for p in layer.parameters())))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_layer_within_a_network_is_right() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 4).double()
    assert torch.autograd.gradcheck(layer, (torch.randn(2, 3, dtype=torch.float64, requires_grad=True),))
    plain, fast = layers(bias=True)
    x = torch.randn(6, 24)
    for kept in (plain, fast):
        kept.weight.requires_grad_(False)
    got = torch.autograd.grad(fast(x.requires_grad_()).cos().sum(), x)[0]
    torch.testing.assert_close(got, torch.autograd.grad(plain(x).cos().sum(), x)[0], rtol=1e-4, atol=1e-5)
    assert fast.weight.grad is None


@pytest.mark.parametrize("trains", [True, False])
def test_a_layer_keeps_its_input_only_if_its_weight_trains(trains: bool) -> None:
    _, fast = layers(bias=True)
    fast.weight.requires_grad_(trains)
    kept = []
    x = torch.randn(6, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda _: None):
        fast(x)
    assert kept == [*([x.shape] if trains else []), fast.weight.shape]


def test_a_frozen_layer_under_no_grad_gives_the_same_values() -> None:
    plain, fast = layers(bias=True)
    x = torch.randn(6, 24)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)


def test_other_number_formats_are_left_to_torch() -> None:
    plain, fast = layers(bias=True)
    x = torch.randn(6, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast(x), plain(x))
    assert torch.equal(fast.double()(x.double()), plain.double()(x.double()))


def test_a_small_model_is_left_as_it_is_and_a_larger_one_keeps_its_weights() -> None:
    small = nn.Sequential(nn.Linear(8, 8))
    cpu.prepare(small)
    assert type(small[0]) is nn.Linear
    large = nn.Sequential(nn.Linear(1500, 1500, bias=False), nn.Bilinear(2, 2, 2))
    before = {name: tensor.clone() for name, tensor in large.state_dict().items()}
    cpu.prepare(large)
    assert type(large[0]) is cpu.OneDNNLinear
    assert type(large[1]) is nn.Bilinear
    assert all(torch.equal(before[name], tensor) for name, tensor in large.state_dict().items())


class Mallopt:
    """Records what a C library is told, and what it answers; `mallopt` itself where it has it."""

    def __init__(self, answer: int) -> None:
        self.told: list[tuple[int, int]] = []
        self.answer = answer

    def mallopt(self, key: int, value: int) -> int:
        self.told.append((key, value))
        return self.answer


@pytest.mark.parametrize(("answer", "keys"), [(1, [-3, -1]), (0, [-3])])
def test_memory_is_kept_only_where_glibc_takes_both_thresholds(
    monkeypatch: pytest.MonkeyPatch, answer: int, keys: list[int]
) -> None:
    library = Mallopt(answer)
    monkeypatch.setattr(cpu.sys, "platform", "linux")
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda _: library)
    cpu.keep_memory()
    assert [key for key, _ in library.told] == keys


@pytest.mark.parametrize("platform", ["win32", "darwin", "linux"])
def test_without_mallopt_nothing_happens(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(cpu.sys, "platform", platform)
    # Windows has no library to open without a name.
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda _: object() if platform == "linux" else pytest.fail("was opened"))
    cpu.keep_memory()


def test_only_the_base_s_parameters_on_a_cpu_make_a_model_large() -> None:
    base = nn.Linear(1000, 1999, bias=False)
    assert not cpu.is_large(base)
    base.adapter = nn.ModuleDict({"lora_A": nn.Linear(1000, 64), "modules_to_save": nn.Linear(1000, 1999)})
    assert not cpu.is_large(base)
    base.rest = nn.Linear(1000, 1, bias=False)
    assert cpu.is_large(base)
    with torch.device("meta"):
        assert not cpu.is_large(nn.Linear(2000, 2000))


def test_a_packed_four_bit_weight_counts_all_its_numbers() -> None:
    Params4bit = type("Params4bit", (nn.Parameter,), {})  # noqa: N806 - the class of bitsandbytes
    layer = nn.Module()
    layer.weight = Params4bit(torch.zeros(1_000_000, 1, dtype=torch.uint8), requires_grad=False)
    assert cpu.is_large(layer)
