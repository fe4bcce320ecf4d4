"""MeanAudio's family and FoleyDash, against outputs of their own code on weights by rule."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mfmjt import kernels, meanflow
from mfmjt.errors import InputError
from mfmjt.meanflow import OneStep, guide, sample
from mfmjt.model import (
    MFMJT,
    load_foleydash,
    load_meanaudio,
    load_mmaudio,
    load_network,
    to_meanaudio_state_dict,
    to_mmaudio_state_dict,
)
from mfmjt.model.lora import LoRA, add_lora, merge_adapter, merged_state, save_adapter
from tests.oracle import allowance, error
from tests.support.networks import MEANAUDIO, TERMS, inputs, network, pooled
from tests.support.peers import load_peft
from tests.support.weights import draw_all, normal, read

FAMILY = ["meanaudio_tiny", "fluxaudio_tiny", "resonate_tiny"]
INPUTS = {
    "latent": (1, 250, 20), "clip": (1, 64, 1024), "sync": (1, 192, 768), "text": (1, 77, 1024),
}  # fmt: skip
TINY = {"latent_length": 25, "video_length": 8, "sync_length": 24}


def agrees(result: Tensor, truth: Tensor, net: MFMJT) -> None:
    # The longest sum that feeds an output runs through every block's widest matmul.
    terms = net.config.depth * 3 * net.config.mlp_hidden
    assert error(result, truth) <= allowance(truth, torch.float32, terms)


class Published:
    """A network, and what its publisher's code was given and gave."""

    def __init__(self, name: str) -> None:
        self.state, self.given = read("model", name)
        if name == "foleydash_small_16k":  # whose inputs are drawn as its weights are
            self.given |= {f"in.{n}": normal(f"input.{n}", s, 1) for n, s in INPUTS.items()}
        if name.startswith("foleydash"):
            self.net = load_foleydash(self.state, **TINY if name.endswith("tiny") else {})
            names, self.scale = ("clip", "sync", "text"), 4.0
        else:
            self.net = load_meanaudio(self.state)
            names, self.scale = ("text", "pooled"), 4.5
        self.z, self.t = self.given["in.latent"], self.given["in.t"]
        self.r = self.given.get("in.s", self.given.get("in.r", self.t))
        self.cond = {"video" if n == "clip" else n: self.given[f"in.{n}"] for n in names}

    def out(self, name: str) -> Tensor:
        velocity = "v" if "out.v" in self.given else "u"
        return self.given[f"out.{velocity}{name}"]


@pytest.fixture(
    scope="module",
    params=[
        *FAMILY,
        "foleydash_tiny",
        pytest.param("meanaudio_s", marks=pytest.mark.slow),
        pytest.param("foleydash_small_16k", marks=pytest.mark.slow),
    ],
)
def published(request):
    return Published(request.param)


@torch.no_grad()
def test_velocities_are_the_published_ones(published):
    net, z = published.net, published.z
    for i, (r, t) in enumerate(zip(published.r, published.t, strict=True)):
        u, empty = net(z, r, t, **published.cond), net(z, r, t)
        agrees(u, published.out("")[i], net)
        agrees(empty, published.out("_empty")[i], net)
        guided = guide(u, empty, published.scale, "cfg")
        agrees(guided, published.out(f"_cfg{published.scale:g}")[i], net)


@torch.no_grad()
def test_each_sample_has_its_own_interval(published):
    net, z = published.net, published.z
    r, t = published.r[: len(z)], published.t[: len(z)]
    mixed = net(z, r, t, **published.cond)
    if "out.u_mixed" in published.given:
        agrees(mixed, published.out("_mixed"), net)
    for i in range(len(z)):
        one = {name: value[i : i + 1] for name, value in published.cond.items()}
        agrees(net(z[i : i + 1], r[i], t[i], **one), mixed[i : i + 1], net)


@torch.no_grad()
def test_embeddings_are_the_published_ones(published):
    net, given = published.net, published.given
    times = given.get("in.times", published.t)
    begin = 1 - times if net.config.towards_data else times
    agrees(net.t_embed(begin), given["out.t_embed"], net)
    for name in ("out.r_embed", "out.s_embed"):
        if name in given:
            agrees(net.r_embed(times), given[name], net)


@torch.no_grad()
def test_samples_are_the_published_ones(published):
    net = published.net
    for name, truth in published.given.items():
        if found := re.fullmatch(r"out\.sample(\d)(_cfg4\.5)?", name):
            scale, mode = (4.5, "cfg") if found[2] else (1.0, "none")
            null = dict.fromkeys(published.cond)
            made = sample(net, published.z, int(found[1]), published.cond, null, scale, mode)
            agrees(made, truth, net)


@pytest.mark.parametrize("name", FAMILY)
def test_import_and_export_are_inverse(name):
    state, _ = read("model", name)
    exported = to_meanaudio_state_dict(load_meanaudio(state))
    assert exported.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(exported[key], value), key


@pytest.mark.parametrize(
    ("name", "millions", "entries"),
    [("meanaudio_s", 120.502, 202), ("meanaudio_l", 479.531, 202), ("fluxaudio_s", 120.186, 198)],
)
def test_parameter_counts_are_the_published_ones(name, millions, entries):
    with torch.device("meta"):
        net = MFMJT.from_config(name)
    published = to_meanaudio_state_dict(net)
    assert len(published) == entries
    assert round(sum(value.numel() for value in published.values()) / 1e6, 3) == millions


@pytest.mark.parametrize("name", ["meanaudio_s", "meanaudio_l", "fluxaudio_s", "resonate"])
def test_configurations_are_told_apart_by_names_and_shapes(name):
    with torch.device("meta"):
        shapes = to_meanaudio_state_dict(MFMJT.from_config(name))
    # Without memory: the configuration is inferred, and then the weights are missed.
    with pytest.raises(InputError, match=f"the {name} network: .* no plain values"):
        load_meanaudio(shapes)


def test_configurations_differ_in_what_is_inferred():
    with safe_open(Path(__file__).parent / "vectors" / "meanaudio_tiny.safetensors", "pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
    net = load_meanaudio(draw_all(shapes, 1))
    assert net.config.name == "custom"
    assert (net.config.second_time, net.config.pooled_dim, net.config.video) == ("r", 24, "none")
    flux = load_meanaudio({k: v for k, v in draw_all(shapes, 1).items() if "r_embed" not in k})
    assert flux.config.second_time == "t - r"
    assert not any(bool(p.any()) for p in flux.r_embed.mlp[2].parameters())


def behind(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


TABLES = ("t_embed.freqs", "r_embed.freqs", "latent_rot", "text_rot", "_extra_state")
WRAPPED = {
    "averaged": lambda s: behind("ema_model.", s) | {"initted": torch.ones(1)},
    "averaged, raw beside": lambda s: (
        behind("ema_model.", s) | {name: value + 1 for name, value in s.items()}
    ),
    "state of averaging": lambda s: behind("ema_model.", s | {"_extra_state": torch.ones(1)}),
    "module": lambda s: behind("module.", s),
    "compiled": lambda s: behind("_orig_mod.", s),
    "tables": lambda s: s | {name: torch.zeros(3) for name in TABLES},
    "half": lambda s: {name: value.half() for name, value in s.items()},
}


@pytest.mark.parametrize("load", [load_meanaudio, load_network])
@pytest.mark.parametrize("way", WRAPPED)
def test_files_are_read_behind_prefixes_and_with_what_trainings_add(tmp_path, way, load):
    state, _ = read("model", "meanaudio_tiny")
    torch.save(WRAPPED[way](state), tmp_path / "a.pth")
    found = to_meanaudio_state_dict(load(tmp_path / "a.pth"))
    for name, value in state.items():
        assert torch.equal(found[name], value.half().float() if way == "half" else value), name


def test_parts_of_a_file_are_read_by_their_index(tmp_path):
    state, _ = read("model", "meanaudio_tiny")
    names = list(state)
    parts = {"a-00001-of-00002.safetensors": names[:40], "a-00002-of-00002.safetensors": names[40:]}
    for file, held in parts.items():
        save_file({name: state[name].contiguous() for name in held}, tmp_path / file)
    where = {name: file for file, held in parts.items() for name in held}
    (tmp_path / "a.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    found = to_meanaudio_state_dict(load_meanaudio(tmp_path / "a.safetensors.index.json"))
    assert all(torch.equal(found[name], value) for name, value in state.items())
    with pytest.raises(InputError, match=r"give the \.index\.json beside it"):
        load_meanaudio(tmp_path / "a-00001-of-00002.safetensors")


def test_a_missing_null_vector_is_the_mean_of_the_null_tokens():
    state, _ = read("model", "resonate_tiny")
    del state["empty_string_feat_c"]
    net = load_meanaudio(state)
    assert torch.equal(net.empty_string_feat_c, state["empty_string_feat"].mean(0))
    state, _ = read("model", "meanaudio_tiny")  # whose vector is of another encoder
    del state["empty_string_feat_c"]
    with pytest.raises(InputError, match="missing empty_string_feat_c"):
        load_meanaudio(state)


def test_every_wrong_parameter_is_named():
    state, _ = read("model", "meanaudio_tiny")
    del state["fused_blocks.1.linear1.bias"], state["r_embed.mlp.0.bias"]
    state["repa_mlp.weight"] = torch.zeros(1)
    state["text_cond_proj.0.bias"] = torch.zeros(7)
    with pytest.raises(InputError) as caught:
        load_meanaudio(state)
    for text in (
        "missing fused_blocks.1.linear1.bias",
        "missing r_embed.mlp.0.bias",
        "unexpected repa_mlp.weight",
        "text_cond_proj.0.bias has shape (7,), not (128,)",
    ):
        assert text in str(caught.value)


def test_families_are_told_apart(tmp_path):
    states = {
        load: read("model", name)[0]
        for load, name in (
            (load_mmaudio, "net_tiny"),
            (load_meanaudio, "meanaudio_tiny"),
            (load_foleydash, "foleydash_tiny"),
        )
    }
    for load, state in states.items():
        assert load_network(state).config == load(state).config
        for other in states.keys() - {load}:
            with pytest.raises(InputError, match=f"Read it with {load.__name__}"):
                other(state)
    unknown = {"audio_input_proj.0.weight": torch.zeros(4, 4, 7)}
    torch.save(unknown, tmp_path / "unknown.pth")
    for load in (*states, load_network):
        with pytest.raises(InputError, match=r"a network of no known family: .*MeanAudio can be"):
            load(tmp_path / "unknown.pth")


def test_a_configuration_that_is_named_must_fit():
    mean, flux = (read("model", f"{name}audio_tiny")[0] for name in ("mean", "flux"))
    with pytest.raises(InputError, match=r"the meanaudio_s network: .* has shape"):
        load_meanaudio(mean, "meanaudio_s")
    with pytest.raises(InputError, match=r"has r_embed, .* fluxaudio_s network has none"):
        load_meanaudio(mean, "fluxaudio_s")
    with pytest.raises(InputError, match=r"missing r_embed\.mlp"):
        load_meanaudio(flux, "meanaudio_s")
    assert load_meanaudio(flux, second_time="r").config.second_time == "r"


# What it takes and refuses


def given(batch=2, **options):
    z, r, t, features = inputs(batch, **options)
    return z, r, t, {"text": features["text"], "pooled": pooled(batch)}


def close(a: Tensor, b: Tensor, terms: int = TERMS) -> None:
    assert error(a, b) <= allowance(b, torch.float64, terms)


@torch.no_grad()
def test_none_is_null_and_so_is_what_is_masked():
    net = network(**MEANAUDIO)
    z, r, t, cond = given()
    null = {"text": net.empty_string_feat[None], "pooled": net.empty_string_feat_c[None]}
    close(net(z, r, t), net(z, r, t, **null))
    close(net(z, r, t, text=cond["text"]), net(z, r, t, **null | {"text": cond["text"]}))
    close(net(z, r, t, pooled=cond["pooled"]), net(z, r, t, **null | {"pooled": cond["pooled"]}))
    mask = torch.tensor([True, False])
    mixed = net(z, r, t, **cond, text_mask=mask, video_mask=~mask)  # it has no video to mask
    close(mixed[:1], net(z, r, t, **cond)[:1])
    close(mixed[1:], net(z, r, t)[1:])


@torch.no_grad()
def test_text_has_positions():
    """A permutation of tokens changes u, as it does not for MMAudio's networks."""
    z, r, t, cond = given(text=5)
    turned = {"text": cond["text"].flip(1), "pooled": cond["pooled"]}
    for rope in (True, False):
        net = network(**MEANAUDIO | {"text_rope": rope})
        u, other = net(z, r, t, **cond), net(z, r, t, **turned)
        if rope:
            assert error(u, other) > 100 * allowance(u, torch.float64, TERMS)
        else:
            close(u, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": torch.zeros(2, 4, 6)}, "network of text alone.*small_16k, .*trained further"),
        ({"sync": torch.zeros(2, 8, 5)}, "network of text alone"),
        ({"pooled": torch.zeros(2, 8)}, r"pooled has shape \(2, 8\): nano takes \(batch, 9\)"),
        ({"pooled": torch.zeros(2, 1, 9)}, "pooled has shape"),
        ({"pooled": torch.zeros(3, 9)}, "differ in samples: text 2, pooled 3"),
        ({"text": torch.zeros(2, 3, 8)}, "text has shape"),
        ({"text_mask": torch.ones(3, dtype=torch.bool)}, "mask of text"),
    ],
)
def test_bad_inputs_are_named(change, message):
    net = network(**MEANAUDIO)
    z, r, t, cond = given()
    with pytest.raises(InputError, match=message):
        net(z, r, t, **cond | change)


def test_a_vector_for_a_network_that_pools_itself_is_refused():
    z, r, t, features = inputs()
    with pytest.raises(InputError, match="pooled comes with nano, which pools the text itself"):
        network()(z, r, t, **features, pooled=pooled())


@pytest.mark.parametrize("field", ["video", "second_time"])
def test_bad_configurations_are_named(field):
    with pytest.raises(InputError, match=f"{field} is 'some'. Give one of"):
        MFMJT.from_config("nano", **{field: "some"})


# What every network does

KINDS = {"text": MEANAUDIO, "gated": MEANAUDIO | {"video": "gated"}}


@pytest.fixture(params=KINDS)
def kind(request):
    """(network, z, r, t, conditions) of text alone, and of text with video gated in."""
    net = network(**KINDS[request.param])
    z, r, t, features = inputs()
    cond = {name: features[name] for name in ("video", "sync", "text") if request.param != "text"}
    return net, z, r, t, {"text": features["text"], **cond, "pooled": pooled()}


@pytest.mark.parametrize("lengths", [{}, {"length": 1, "text": 1}, {"length": 17, "text": 6}])
@pytest.mark.parametrize("name", KINDS)
def test_the_prepared_step_is_the_same(name, lengths):
    net = network(**KINDS[name])
    z, _, _, features = inputs(**lengths)
    cond = features if name == "gated" else {"text": features["text"]}
    cond = {**cond, "pooled": pooled()}
    plain, frozen = OneStep(net, compile=False), OneStep(net)
    without_sync = {name: value for name, value in cond.items() if name != "sync"}
    for given in (cond, {}, {"pooled": cond["pooled"]}, {"text": cond["text"]}, without_sync):
        close(frozen(z, **given), plain(z, **given))
    mask = torch.tensor([True, False])
    close(frozen(z, **cond, text_mask=mask), plain(z, **cond, text_mask=mask))
    one = {name: value[:1] for name, value in cond.items()}
    close(frozen(z, **one), plain(z, **{n: v.expand(2, *v.shape[1:]) for n, v in one.items()}))


def test_tangents_and_gradients_are_those_of_the_references(kind):
    net, z, r, t, cond = kind
    bar, v = torch.randn_like(z), torch.randn_like(z)

    def step():
        u, du = torch.func.jvp(lambda z, t: net(z, r, t, **cond), (z, t), (v, torch.ones_like(t)))
        net.zero_grad()
        (u * bar).sum().backward()
        return u.detach(), du.detach(), {n: p.grad for n, p in net.named_parameters()}

    u, du, gradients = step()
    with kernels.reference():
        u_ref, du_ref, gradients_ref = step()
    close(u, u_ref)
    close(du, du_ref)
    close(net.jvp_rows(z, r, t, v[:1], **cond)[1], du[:1])
    for name, gradient in gradients.items():
        if not net.get_parameter(name).requires_grad or name.startswith("empty_"):
            assert gradient is None, name
        else:
            assert gradient.any(), name
            close(gradient, gradients_ref[name], TERMS * z.shape[1])


def test_the_objective_is_that_of_its_definition(kind):
    net, z, _, _, cond = kind
    r, t = torch.tensor([0.1, 0.6]).double(), torch.tensor([0.7, 0.6]).double()
    drawn = {"noise": torch.randn_like(z), "r": r, "t": t}
    loss = meanflow.loss(net, z, cond, intervals=1, **drawn)
    with kernels.reference():
        truth = meanflow.loss(net, z, cond, **drawn)
    close(loss, truth)


@pytest.mark.parametrize("way", ["recomputed", pytest.param("compiled", marks=pytest.mark.slow)])
def test_gradients_are_the_same_in_another_way(kind, way):
    net, z, _, _, cond = kind
    r, t = torch.tensor([0.1, 0.6]).double(), torch.tensor([0.7, 0.6]).double()

    def loss():
        noise = torch.ones_like(z)
        return meanflow.loss(net, z, cond, intervals=1, noise=noise, r=r, t=t)

    def gradients(function):
        net.zero_grad()
        function().backward()
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    truth = gradients(loss)
    if way == "compiled":
        found = gradients(torch.compile(loss, backend="aot_eager", fullgraph=True))
    else:
        net.recompute_blocks()
        found = gradients(loss)
    assert truth.keys() == found.keys()
    for name, value in truth.items():
        close(found[name], value, TERMS * z.shape[1])


def test_it_is_saved_and_read(kind, tmp_path):
    net, *_ = kind
    net.float().save(tmp_path / "net.safetensors")
    again = MFMJT.load(tmp_path / "net.safetensors")
    assert again.config == net.config
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


def test_adapters_are_trained_merged_and_kept(kind, tmp_path):
    load_peft()
    net, z, r, t, cond = kind
    start = {name: value.clone() for name, value in net.state_dict().items()}
    lora = LoRA(rank=2)
    add_lora(net, lora)
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    video = re.compile(r"clip_|sync_|empty_(clip|sync)|joint_blocks\.\d\.(clip_block|video_gate)")
    for name in trained:
        assert ".lora_" in name or name.startswith("r_embed.") or video.match(name), name
    assert any(video.match(name) for name in trained) == net.config.takes_video
    with torch.no_grad():
        for name in trained:
            parameter = net.get_parameter(name)
            parameter.add_(0.02 * torch.randn_like(parameter))
        save_adapter(net.state_dict(), lora, tmp_path / "adapter.safetensors")
        plain = MFMJT(net.config).double()
        plain.load_state_dict(start)
        merge_adapter(plain, tmp_path / "adapter.safetensors")
        merged = merged_state(net.state_dict(), lora)
        assert all(torch.equal(value, merged[n]) for n, value in plain.state_dict().items())
        close(plain(z, r, t, **cond), net(z, r, t, **cond))


# Video for a network of text


def test_video_changes_nothing_at_first_and_is_learned_at_once(tmp_path):
    state, given = read("model", "meanaudio_tiny")
    sizes = {"video_dim": 6, "sync_dim": 5}
    net = load_meanaudio(state, video="gated", **sizes)
    again = load_meanaudio(state, video="gated", **sizes).state_dict()
    assert all(torch.equal(again[name], value) for name, value in net.state_dict().items())
    z, cond = given["in.latent"], {"text": given["in.text"], "pooled": given["in.pooled"]}
    video = {"video": torch.randn(2, 4, 6), "sync": torch.randn(2, 8, 5)}
    for i, (r, t) in enumerate(zip(given["in.r"], given["in.t"], strict=True)):
        with torch.no_grad():
            agrees(net(z, r, t, **cond, **video), given["out.u"][i], net)
            agrees(net(z, r, t, **cond), given["out.u"][i], net)
            agrees(net.frozen(float(r), float(t))(z, **cond, **video)[:2], given["out.u"][i], net)
    net(z, 0.0, 1.0, **cond, **video).square().mean().backward()
    ways_in = [
        *(block.video_gate for block in net.joint_blocks),
        net.clip_cond_proj.weight,
        net.sync_input_proj[-1].w2.weight,
    ]
    assert all(not p.any() and p.grad.any() for p in ways_in)
    before = net(z, 0.0, 1.0, **cond, **video).detach()
    torch.optim.SGD(ways_in, 0.1).step()
    with torch.no_grad():
        other = {name: value.flip(0) for name, value in video.items()}
        shown, unlike = net(z, 0.0, 1.0, **cond, **video), net(z, 0.0, 1.0, **cond, **other)
    least = allowance(before, torch.float32, TERMS)
    assert error(shown, before) > 10 * least
    assert error(shown, unlike) > 10 * least
    with pytest.raises(InputError, match="has video"):
        net.with_video()
    with pytest.raises(InputError, match="has no place in MeanAudio's layout"):
        to_meanaudio_state_dict(net)


@torch.no_grad()
def test_gated_attention_is_a_sum_of_two():
    """Against plain PyTorch: softmax over latent and text, plus a share of that over video."""
    from mfmjt.model.blocks import Blocks

    net = network(**MEANAUDIO | {"video": "gated"})
    together = net.joint_blocks[0].together()
    q, k = ([torch.randn(2, n, 2, 16).double() for n in (5, 4, 3)] for _ in range(2))
    v = [torch.randn_like(x) for x in k]

    def attend(q, keys, values):
        q, k, v = (x.transpose(1, 2) for x in (q, torch.cat(keys, 1), torch.cat(values, 1)))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    assert isinstance(together, Blocks)
    for found, queries in zip(together.attend(tuple(q), tuple(k), tuple(v)), q, strict=True):
        rest = attend(queries, k[::2], v[::2])
        truth = rest + together.gate[:, None] * attend(queries, k[1:2], v[1:2])
        close(found, truth, 16 * 8)


# FoleyDash


def test_foleydash_becomes_a_network_of_mmaudios():
    state, _ = read("model", "foleydash_tiny")
    before = {name: value.clone() for name, value in state.items()}
    net = load_foleydash(state, **TINY)
    assert all(torch.equal(before[name], value) for name, value in state.items())
    assert net.config.towards_data
    assert net.config.second_time == "t - r"
    again = load_mmaudio(to_mmaudio_state_dict(net), **TINY)
    assert again.config == net.config
    same = again.state_dict()
    kept = {n: v for n, v in net.state_dict().items() if not n.startswith("r_embed.")}
    assert all(torch.equal(same[name], value) for name, value in kept.items())
    del state["s_embed.mlp.2.bias"]
    with pytest.raises(InputError, match=r"missing r_embed\.mlp\.2\.bias"):
        load_foleydash(state)
