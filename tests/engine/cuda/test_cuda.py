"""On a real device: kernels, graphs, streams and events, and the whole engine. Skipped where there is none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from baton.engine.attention import Call
from baton.engine.config import EngineConfig
from baton.engine.cuda.attention import BACKENDS, Attention, choose, proves_itself
from baton.engine.cuda.engine import DeviceEngine
from baton.engine.cuda.inputs import Inputs
from baton.engine.cuda.pages import Pages
from baton.engine.cuda.pool import PagedPool
from baton.engine.cuda.sampling import UNSETTLED, SamplingInputs
from baton.engine.cuda.sdpa import GatheredAttention
from baton.engine.cuda.streams import CudaStreams
from baton.engine.engine import Engine
from baton.engine.layout import KvDtype, LayerSpec, PoolLayout
from baton.engine.loader import LoadedModel, load
from baton.engine.messages import Commit, Role, SamplingParams
from baton.engine.rng import uniform
from baton.engine.sampler import SampleRow, sample
from baton.engine.scheduler import Work
from tests.engine.conftest import Stepped, a_prompt, a_submit
from tests.engine.cuda.conftest import check_all_back
from tests.engine.cuda.test_engine import batch
from tests.engine.cuda.test_engine import expected as expected
from tests.engine.cuda.test_sampling import MODES
from tests.engine.test_step import Part, a_request
from tests.fixtures.device_models import EIGHT_B, random_on_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class OnDevice(Stepped):
    """The engine as it is served on a device: its own choice of backend, with real graphs."""

    engine: DeviceEngine

    def __init__(self, model: LoadedModel, **config: object) -> None:
        self.events = []
        settings = dataclasses.replace(
            EngineConfig(model=Path(), dtype=model.spec.dtype, num_slots=8, slot_tokens=512, step_tokens=64),
            **config,  # type: ignore[arg-type]
        )
        self.engine = DeviceEngine(settings, model, self.events.extend)

    def check_pages(self) -> None:
        self.check_empty()
        check_all_back(self.engine)


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(scope="module")
def loaded_cuda(llama: Path) -> LoadedModel:
    return load(EngineConfig(model=llama, device="cuda"))


@pytest.fixture(scope="module")
def one_layer(device: torch.device) -> LoadedModel:
    """Of an 8B model, in bfloat16."""
    return random_on_device(device, KvDtype.BFLOAT16, **{**EIGHT_B, "num_hidden_layers": 1})


# ------------------------------------------------------------------------------------------- kernels


def made(index: int) -> Attention:
    try:
        return BACKENDS[index]()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("index", range(len(BACKENDS)))
def test_kernels_that_are_here_give_sdpas_results(index: int, device: torch.device) -> None:
    backend = made(index)
    try:
        assert proves_itself(backend, device, torch.bfloat16)
    except (RuntimeError, TypeError, ValueError) as error:
        pytest.skip(f"{backend.name} refuses: {error}")


def test_what_lies_behind_a_requests_tokens_is_never_seen(device: torch.device) -> None:
    """Nothing is wiped between requests, so NaN there must be harmless."""
    backend = choose(device, torch.bfloat16)
    layer = LayerSpec(key="0", heads=2, key_dim=64, value_dim=64)
    size = backend.page_size
    pages = Pages(4, size, 2, 2 * size)
    parts = (Part(0, 9, 1, 10), Part(1, size + 2, 1, size + 3))
    for part in parts:
        pages.prepare(part.slot, 0, part.total)
    generator = torch.Generator(device).manual_seed(0)
    keys, values = (torch.randn(5, size, 2, 64, device=device, generator=generator).bfloat16() for _ in range(2))
    query = torch.randn(2, 4, 64, device=device, generator=generator).bfloat16()
    inputs = Inputs(2, 2, pages, device, pinned=True)
    inputs.fill([Work(a_request(part), part.start, 1) for part in parts], {})
    call = Call(None, None, None, None, 0)
    clean = backend.decode(query, keys, values, inputs.rows(2, 2), layer, call)
    seen = torch.zeros(5 * size, dtype=torch.bool, device=device)
    for part in parts:
        seen[torch.from_numpy(pages.places(part.slot, 0, part.total)).long().to(device)] = True
    for tensor in (keys, values):
        tensor.flatten(0, 1)[~seen] = torch.nan
    assert torch.equal(backend.decode(query, keys, values, inputs.rows(2, 2), layer, call), clean)


# ------------------------------------------------------------------------------------------- streams


def test_layers_come_down_beside_the_computation(device: torch.device) -> None:
    layers = tuple(LayerSpec(key=str(i), heads=8, key_dim=128, value_dim=128) for i in range(2))
    layout = PoolLayout.build(layers, KvDtype.BFLOAT16, 2, 2048)
    streams = CudaStreams(device)
    pool = PagedPool(layout, 4096, 256, device, streams)
    pool.prepare(1, 0, 2000)
    for pages in (*pool.key_pages, *pool.value_pages):
        pages.normal_()
    busy = torch.randn(4096, 4096, device=device)
    events = []
    for layer in range(2):
        events.append(pool.download(layer, 1, 0, 2000))
        for _ in range(20):
            busy = busy @ busy * 1e-3
    computed = streams.record()
    events[0].synchronize()
    if pool.registered:
        assert not computed.query(), "the copy waited for what was launched after it"
    events[1].synchronize()
    places = torch.from_numpy(pool.pages.places(1, 0, 2000)).long().to(device)
    for side, pages in ((pool.keys, pool.key_pages), (pool.values, pool.value_pages)):
        for layer in range(2):
            assert torch.equal(side[layer][1, :2000], pages[layer].flatten(0, 1)[places].cpu())
    before = [pages.flatten(0, 1)[places].clone() for pages in pool.key_pages]
    for pages in pool.key_pages:
        pages.zero_()
    pool.upload(1, 0, 2000)
    assert all(torch.equal(pages.flatten(0, 1)[places], old) for pages, old in zip(pool.key_pages, before, strict=True))


# ------------------------------------------------------------------------------------------- sampler


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_settled_tokens_are_the_hosts(mode: dict[str, float], device: torch.device) -> None:
    generator = torch.Generator().manual_seed(5)
    unsettled = 0
    for i in range(8):
        logits = torch.randn(64, 32000, generator=generator) * 4
        rows = [
            SampleRow(SamplingParams(max_tokens=9, seed=1000 * i + j, **mode), 7 * j, (), ())  # type: ignore[arg-type]
            for j in range(64)
        ]
        got = SamplingInputs(64, device, pinned=True).sample(logits.to(device), rows).tolist()
        assert all(g in (e, UNSETTLED) for g, e in zip(got, sample(logits, rows), strict=True))
        unsettled += got.count(UNSETTLED)
    assert unsettled <= 5


def test_random_numbers_are_the_same_bits(device: torch.device) -> None:
    from baton.engine.cuda.rng import signed, uniforms

    seeds = [0, 1, 2**63, 2**64 - 1, 12345678901234567890]
    got = uniforms(torch.tensor([signed(s) for s in seeds], device=device), torch.arange(5, device=device))
    assert got.tolist() == [uniform(seed, position) for position, seed in enumerate(seeds)]


# -------------------------------------------------------------------------------------------- engine


def test_float32_tokens_of_the_cpu_engine(loaded_cuda: LoadedModel, expected: list[list[int]]) -> None:
    stepped = OnDevice(loaded_cuda).run(*batch())
    assert stepped.engine.runner.graphs.sizes == [1, 2, 4, 8]
    assert [stepped.tokens(f"r{i}") for i in range(8)] == expected
    stepped.check_pages()


def test_the_device_has_the_engine_it_is_made_for(llama: Path) -> None:
    events: list[object] = []
    config = EngineConfig(model=llama, device="cuda", dtype=KvDtype.BFLOAT16, num_slots=4, slot_tokens=256)
    assert type(Engine.load(config, events.extend)) is DeviceEngine


def test_an_8b_shaped_layer_in_bfloat16(one_layer: LoadedModel) -> None:
    """Each captured size was compared with the model's own logits on the way here."""
    stepped = OnDevice(one_layer, num_slots=16, step_tokens=512)
    assert stepped.engine.runner.graphs.sizes == [1, 2, 4, 8, 16]
    modes: list[dict[str, object]] = [{}, {"temperature": 0.8, "top_p": 0.95}, {"presence_penalty": 0.4}]
    submits = [
        a_submit(f"r{i}", a_prompt(20 + 17 * i, i), max_tokens=20 + i, seed=i, **modes[i % 3]) for i in range(16)
    ]
    stepped.run(*submits)
    assert [len(stepped.tokens(f"r{i}")) for i in range(16)] == [20 + i for i in range(16)]
    stepped.check_pages()


def test_a_handoff_in_bfloat16_changes_nothing(one_layer: LoadedModel) -> None:
    """The bytes are the same and so are the shapes: the tokens must be."""
    prompt = a_prompt(300)
    wanted = OnDevice(one_layer).run(a_submit("r", prompt, max_tokens=20)).tokens("r")
    prefill, decode = OnDevice(one_layer), OnDevice(one_layer)
    first = prefill.run(a_submit("r", prompt, Role.PREFILL, max_tokens=20)).tokens("r")
    decode.handle(a_submit("r", prompt, Role.RECEIVE, max_tokens=20))
    decode.step()
    decode.write_kv(decode.slot("r"), 0, prefill.kv(prefill.slot("r"), 0, 300))
    decode.run(Commit("r", first))
    assert first + decode.tokens("r") == wanted
    decode.check_pages()


def test_sdpa_can_be_captured_too(one_layer: LoadedModel) -> None:
    """It serves what the kernels do not."""
    events: list[object] = []
    config = EngineConfig(model=Path(), dtype=KvDtype.BFLOAT16, num_slots=4, slot_tokens=256)
    engine = DeviceEngine(config, one_layer, events.extend, attention=GatheredAttention())
    assert engine.runner.graphs.sizes == [1, 2, 4]
