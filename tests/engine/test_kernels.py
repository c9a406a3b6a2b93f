"""Compiled kernels against torch's own operators, and the directory they are kept in."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from baton.engine.attention import Call, attend
from baton.engine.errors import EngineError
from baton.engine.kernels import build
from baton.engine.kernels.build import NoCompiler, library
from baton.engine.kernels.decode import decode_kernel
from baton.engine.kernels.norm import RmsNorm, replace_norms

SOURCE = Path(build.__file__).with_name("attention.c")
SLOTS, SLOT_TOKENS = 6, 80

pytestmark = pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler")


def random(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Batch:
    """Requests in slots of a pool, one new token each."""

    def __init__(self, dtype: torch.dtype, heads: int, kv_heads: int, key_dim: int, value_dim: int) -> None:
        self.places = [(4, 33), (0, 1), (2, 80), (5, 7)]  # slot, keys
        self.keys = random(SLOTS, SLOT_TOKENS, kv_heads, key_dim, seed=1, dtype=dtype)
        self.values = random(SLOTS, SLOT_TOKENS, kv_heads, value_dim, seed=2, dtype=dtype)
        rows = len(self.places)
        # As model code hands them over: views of [tokens, heads, dim].
        self.query = random(1, rows, heads, key_dim, seed=3, dtype=dtype).transpose(1, 2)
        self.key = random(1, rows, kv_heads, key_dim, seed=4, dtype=dtype).transpose(1, 2)
        self.value = random(1, rows, kv_heads, value_dim, seed=5, dtype=dtype).transpose(1, 2)

    def run(self, call: Call, window: int = 0, rows: slice = slice(None)) -> torch.Tensor:
        kernel = decode_kernel()
        assert kernel is not None
        places = self.places[rows]
        query, key, value = (t[:, :, rows] for t in (self.query, self.key, self.value))
        out = query.new_full((1, len(places), query.shape[1], value.shape[3]), torch.nan)
        firsts = [max(0, n - window) if window else 0 for _, n in places]
        sights = (torch.tensor([s for s, _ in places]), torch.tensor(firsts), torch.tensor([n for _, n in places]))
        kernel(query, key, value, self.keys, self.values, out, sights, call)
        return out

    def expected(self, call: Call, window: int = 0) -> torch.Tensor:
        """In float64, request by request."""
        outs = []
        for row, (slot, n) in enumerate(self.places):
            first = max(0, n - window) if window else 0
            k = torch.cat((self.keys[slot, first : n - 1], self.key[0, :, row][None])).double()
            v = torch.cat((self.values[slot, first : n - 1], self.value[0, :, row][None])).double()
            sinks = None if call.sinks is None else call.sinks.double()
            exact = Call(call.scaling, call.softcap, sinks, call.window, 0)
            q = self.query[:, :, row : row + 1].double()
            outs.append(attend(q, k.transpose(0, 1)[None], v.transpose(0, 1)[None], exact, None)[0, :, 0])
        return torch.stack(outs)[None]


SHAPES = [(4, 2, 16, 16), (6, 2, 24, 24), (4, 4, 64, 64), (12, 4, 64, 64), (8, 1, 20, 12), (2, 2, 128, 128)]
CALLS = [
    Call(None, None, None, None, 0),
    Call(0.3, None, None, None, 0),
    Call(None, 5.0, None, None, 0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("call", "window"), list(itertools.product(CALLS, (0, 12))))
def test_decode_attention(dtype: torch.dtype, shape: tuple[int, int, int, int], call: Call, window: int) -> None:
    batch = Batch(dtype, *shape)
    got, expected = batch.run(call, window), batch.expected(call, window)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    for row, (slot, n) in enumerate(batch.places):
        assert torch.equal(batch.keys[slot, n - 1], batch.key[0, :, row])
        assert torch.equal(batch.values[slot, n - 1], batch.value[0, :, row])


def test_sinks_take_their_share() -> None:
    batch = Batch(torch.float32, 6, 2, 24, 24)
    call = Call(None, None, torch.linspace(-2, 6, 6), None, 0)
    torch.testing.assert_close(batch.run(call).double(), batch.expected(call), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_bitwise_the_same_in_every_batch(dtype: torch.dtype) -> None:
    batch = Batch(dtype, 12, 4, 64, 64)
    together = batch.run(CALLS[0])
    for row in range(len(batch.places)):
        assert torch.equal(batch.run(CALLS[0], rows=slice(row, row + 1)), together[:, row : row + 1])


def test_another_element_type_than_the_pools_is_refused() -> None:
    batch = Batch(torch.bfloat16, 4, 2, 16, 16)
    batch.query = batch.query.float()
    with pytest.raises(EngineError, match="float32"):
        batch.run(CALLS[0])


def test_what_lies_behind_a_request_is_never_read() -> None:
    batch = Batch(torch.bfloat16, 12, 4, 64, 64)
    expected = batch.run(CALLS[0])
    for slot, n in batch.places:
        batch.keys[slot, n:] = torch.nan
        batch.values[slot, n:] = torch.nan
    assert torch.equal(batch.run(CALLS[0]), expected)


def test_nan_stays_in_its_row() -> None:
    batch = Batch(torch.bfloat16, 12, 4, 64, 64)
    expected = batch.run(CALLS[0])
    batch.keys[2, 3] = torch.nan
    got = batch.run(CALLS[0])
    assert got[0, 2].isnan().all()
    assert torch.equal(got[0, [0, 1, 3]], expected[0, [0, 1, 3]])


class FirstRMSNorm(nn.Module):
    """Rounds, then multiplies: Llama's."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(dim, seed=1, dtype=torch.float32))
        self.variance_epsilon = 1e-6

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * self.normed(x).to(x.dtype)


class SecondRMSNorm(FirstRMSNorm):
    """Multiplies by one more than the weight, then rounds: Gemma's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.normed(x) * (1 + self.weight.float())).to(x.dtype)


class OtherRMSNorm(FirstRMSNorm):
    """A formula nobody knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.normed(x) * (2 + self.weight.float())).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [FirstRMSNorm, SecondRMSNorm])
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 300, 48), (1, 7, 4, 24), (1, 3, 768)])
def test_norms(dtype: torch.dtype, kind: type[FirstRMSNorm], shape: tuple[int, ...]) -> None:
    model = nn.Sequential(kind(shape[-1])).to(dtype)
    original = model[0]
    x = random(*shape, seed=3, dtype=dtype)
    with torch.inference_mode():
        replace_norms(model)
        assert isinstance(model[0], RmsNorm)
        got, expected = model(x), original(x)
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=1e-6)


def test_a_norm_takes_another_element_type_than_its_weight_has() -> None:
    model = nn.Sequential(FirstRMSNorm(48)).to(torch.bfloat16)
    original, x = model[0], random(3, 48, seed=3, dtype=torch.float32)
    with torch.inference_mode():
        replace_norms(model)
        assert isinstance(model[0], RmsNorm)
        assert torch.equal(model(x), original(x))


def test_an_unknown_formula_is_left_alone() -> None:
    model = nn.Sequential(OtherRMSNorm(48))
    with torch.inference_mode():
        replace_norms(model)
    assert type(model[0]) is OtherRMSNorm


def test_a_kernel_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library(SOURCE)
    (made,) = (tmp_path / "baton" / "kernels").iterdir()
    before = made.stat().st_mtime_ns
    library(SOURCE)
    assert made.stat().st_mtime_ns == before


def test_compiling_at_the_same_time_does_not_disturb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = SOURCE.with_name("norm.c")
    with ThreadPoolExecutor(4) as threads:
        for made in [threads.submit(library, source) for _ in range(4)]:
            made.result()
    assert len(list((tmp_path / "baton" / "kernels").iterdir())) == 1


def test_a_file_that_was_cut_short_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = tmp_path / "baton" / "kernels"
    directory.mkdir(parents=True, mode=0o700)
    digest = build._digest(SOURCE, shutil.which("cc") or "", *build._machine())
    (directory / f"attention-{digest}.so").write_bytes(b"\x7fELF")
    assert library(SOURCE).decode_float32


def test_code_that_others_may_write_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = tmp_path / "baton" / "kernels"
    directory.mkdir(parents=True)
    os.chmod(directory, 0o777)
    library(SOURCE)
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize(("mode", "kept"), [(0o755, True), (0o1777, True), (0o777, False), (0o770, False)])
def test_code_is_not_kept_where_others_may_swap_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, kept: bool
) -> None:
    above = tmp_path / "above"
    above.mkdir()
    above.chmod(mode)
    monkeypatch.setenv("XDG_CACHE_HOME", str(above / "cache"))
    library(SOURCE.with_name("norm.c"))
    assert len(list((above / "cache" / "baton" / "kernels").iterdir())) == kept


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_code_is_not_kept_in_a_directory_of_somebody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "theirs" / "cache"))
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 12345, -1)
    library(SOURCE.with_name("norm.c"))
    assert list((tmp_path / "theirs" / "cache" / "baton" / "kernels").iterdir()) == []


def test_a_link_is_as_good_as_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, mode in (("good", 0o700), ("bad", 0o777)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
        (tmp_path / f"to-{name}").symlink_to(tmp_path / name)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"to-{name}"))
        library(SOURCE.with_name("norm.c"))
        made = list((tmp_path / name / "baton" / "kernels").iterdir())
        assert len(made) == (name == "good")


def test_a_change_of_a_header_compiles_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for path in SOURCE.parent.glob("*.[ch]"):
        shutil.copy(path, tmp_path)
    library(tmp_path / "norm.c")
    with (tmp_path / "element.h").open("a") as header:
        header.write("// changed\n")
    library(tmp_path / "norm.c")
    assert len(list((tmp_path / "cache" / "baton" / "kernels").iterdir())) == 2


def test_no_home_and_no_temporary_directory_are_no_reason_to_fail_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert build.cache_directory() is None
    library(SOURCE)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    with pytest.raises(NoCompiler, match="no directory"):
        library(SOURCE)


@pytest.mark.skipif("avx2" not in Path("/proc/cpuinfo").read_text(), reason="no level of x86-64 that is compiled for")
def test_what_is_installed_needs_no_compiler(tmp_path: Path) -> None:
    subprocess.run([sys.executable, build.__file__, str(tmp_path / "lib")], check=True)
    script = (
        "import sys, torch; from pathlib import Path; from baton.engine.kernels.build import library;"
        "loaded = [library(Path(name)) for name in sys.argv[1:]]; print(Path('/proc/self/maps').read_text())"
    )
    sources = sorted(SOURCE.parent.glob("*.c"))
    bare = {"CC": "false", "LD_LIBRARY_PATH": str(tmp_path / "lib"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, *map(str, sources)]
    done = subprocess.run(command, env=bare, capture_output=True, text=True, check=True)
    level = "v4" if "avx512vl" in Path("/proc/cpuinfo").read_text() else "v3"
    for source in sources:
        assert f"{tmp_path}/lib/glibc-hwcaps/x86-64-{level}/libbaton-{source.stem}-" in done.stdout


def test_no_compiler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(tmp_path / "nothing"))
    with pytest.raises(NoCompiler):
        library(SOURCE)
    monkeypatch.setenv("CC", "false")
    with pytest.raises(NoCompiler, match="failed"):
        library(SOURCE)
