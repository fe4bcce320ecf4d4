from __future__ import annotations

import pytest
import torch

from mfmjt import kernels, meanflow
from mfmjt.errors import InputError
from mfmjt.model import MFMJT, config_for
from mfmjt.model.conditioning import TimeEmbedding, nearest_rows, rope_table
from tests.oracle import allowance, error
from tests.support.networks import DIMS, SMALL, TERMS, inputs, network


def close(a, b, dtype=torch.float64, terms=TERMS):
    assert error(a, b) <= allowance(b.double(), dtype, terms)


@pytest.mark.parametrize("v2", [False, True])
def test_fresh_network_gives_exactly_zero(v2):
    net = MFMJT.from_config("nano", **SMALL, **DIMS, v2=v2)
    z, r, t, features = inputs(dtype=torch.float32)
    assert torch.equal(net(z, r, t, **features), torch.zeros_like(z))


def test_interval_is_ignored_until_its_embedding_is_trained():
    net = network()
    z, r, t, features = inputs()
    with torch.no_grad():
        assert error(net(z, r, t, **features), net(z, t, t, **features)) > 0
        net.r_embed.mlp[2].weight.zero_()
        net.r_embed.mlp[2].bias.zero_()
        assert torch.equal(net(z, r, t, **features), net(z, t, t, **features))


@pytest.mark.parametrize("lengths", [(1, 1, 8, 1), (17, 5, 8, 2), (9, 3, 24, 9), (40, 2, 16, 3)])
def test_any_lengths(lengths):
    net = network()
    z, r, t, features = inputs(2, *lengths)
    with torch.no_grad():
        both = net(z, r, t, **features)
        for i in range(2):
            one = {name: value[i : i + 1] for name, value in features.items()}
            close(net(z[i : i + 1], r[i : i + 1], t[i : i + 1], **one), both[i : i + 1])
        alone = net(z, r, t)
    assert both.shape == alone.shape == z.shape


def test_missing_conditions_equal_masked_ones():
    net = network()
    z, r, t, features = inputs(3)
    video, sync = net.config.lengths(z.shape[1])
    features["video"] = torch.randn(3, video, 6, dtype=z.dtype)
    features["sync"] = torch.randn(3, sync, 5, dtype=z.dtype)
    masks = torch.tensor([False, True, False])
    with torch.no_grad():
        masked = net(z, r, t, **features, video_mask=masks, text_mask=masks)
        nothing = net(z, r, t)
        everything = net(z, r, t, **features)
        no_video = net(z, r, t, **features, video_mask=~masks & masks)
        text_alone = net(z, r, t, text=features["text"])
    close(masked[0], nothing[0])
    close(masked[1], everything[1])
    close(masked[2], nothing[2])
    close(no_video, text_alone)
    assert error(nothing, everything) > 0


def test_masked_features_do_not_matter_even_if_not_finite():
    net = network()
    z, r, t, features = inputs(2)
    mask = torch.tensor([True, False])
    with torch.no_grad():
        before = net(z, r, t, **features, video_mask=mask, text_mask=mask)
        for value in features.values():
            value[1] = torch.nan
        after = net(z, r, t, **features, video_mask=mask, text_mask=mask)
    assert torch.equal(before, after)


def test_null_text_of_another_length_repeats_its_last_row():
    net = network()
    z, r, t, features = inputs(1, text=5)
    long = torch.cat((net.empty_string_feat, net.empty_string_feat[-1:].expand(2, -1)))
    mask = torch.tensor([False])
    with torch.no_grad():
        close(
            net(z, r, t, **features, text_mask=mask),
            net(z, r, t, **features | {"text": long[None]}),
        )


def test_encoded_conditions_give_the_same_and_broadcast():
    net = network()
    z, r, t, features = inputs(2)
    with torch.no_grad():
        close(net(z, r, t, cond=net.conditions(**features)), net(z, r, t, **features))
        null = net.conditions(latent_length=z.shape[1])
        assert null.text.shape[0] == 1
        close(net(z, r, t, cond=null), net(z, r, t))


def test_times_may_be_numbers():
    net = network()
    z, _, _, features = inputs(2)
    r, t = torch.full((2,), 0.25, dtype=z.dtype), torch.full((2,), 0.75, dtype=z.dtype)
    with torch.no_grad():
        assert torch.equal(net(z, 0.25, torch.tensor(0.75), **features), net(z, r, t, **features))


def test_every_used_parameter_gets_the_gradient_of_the_references():
    net = network()
    z, r, t, features = inputs()
    bar, v = torch.randn_like(z), torch.randn_like(z)

    def step():
        u, du = torch.func.jvp(
            lambda z, t: net(z, r, t, **features), (z, t), (v, torch.ones_like(t))
        )
        net.zero_grad()
        (u * bar).sum().backward()
        return u.detach(), du.detach(), {n: p.grad for n, p in net.named_parameters()}

    u, du, gradients = step()
    with kernels.reference():
        u_ref, du_ref, gradients_ref = step()
    close(u, u_ref)
    close(du, du_ref)
    for name, gradient in gradients.items():
        frozen = not net.get_parameter(name).requires_grad
        # Null features serve only samples without conditions.
        if frozen or name in ("empty_clip_feat", "empty_sync_feat"):
            assert gradient is None, name
        else:
            assert gradient is not None, name
            assert gradient.any(), name
            close(gradient, gradients_ref[name], terms=TERMS * z.shape[1])


def test_rate_equals_the_difference_quotient():
    net = network()
    z, r, t, features = inputs()
    v = torch.randn_like(z)
    _, du = torch.func.jvp(lambda z, t: net(z, r, t, **features), (z, t), (v, torch.ones_like(t)))
    h = torch.finfo(torch.float64).eps ** (1 / 3)  # balances rounding and the h² of the quotient
    with torch.no_grad():
        ahead = net(z + h * v, r, t + h, **features)
        behind = net(z - h * v, r, t - h, **features)
    quotient = (ahead - behind) / (2 * h)
    du = du.detach()
    assert error(du, quotient) <= TERMS * h**2 * float(du.abs().max())


def test_bfloat16_network_keeps_time_exact():
    embedding = TimeEmbedding(16, 16, max_period=1.0)
    t = torch.rand(5)
    rounded = TimeEmbedding(16, 16, max_period=1.0)
    rounded.load_state_dict({k: v.bfloat16().float() for k, v in embedding.state_dict().items()})
    # Equal to a float32 network with the same weights: only weights are bfloat16, not times.
    assert torch.equal(embedding.bfloat16()(t), rounded(t))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rounded(t), embedding(t))


@pytest.mark.parametrize("mode", ["weights", "autocast"])
def test_bfloat16(mode):
    net = network(torch.float32)
    z, r, t, features = inputs(dtype=torch.float32)
    with torch.no_grad():
        truth = net(z, r, t, **features)
        if mode == "weights":
            result = net.bfloat16()(z, r, t, **features)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                result = net(z, r, t, **features)
    assert result.dtype == z.dtype
    close(result, truth, torch.bfloat16, net.config.depth * 6)


def test_rotary_table():
    table = rope_table(5, 6, 2.5, torch.device("cpu"))
    angle = torch.tensor([[n * 2.5 * 10_000 ** (-i / 3) for i in range(3)] for n in range(5)])
    assert table.dtype == torch.float32
    close(table, torch.stack((angle.cos(), angle.sin()), -1), torch.float32, terms=12)


def test_tables_made_inside_transforms_are_not_kept():
    x = torch.ones(3, requires_grad=True)

    def f(x):
        return x * rope_table(3, 2, 0.123, x.device)[:, 0, 0]

    torch.func.jvp(f, (x,), (torch.ones(3),))
    with torch.inference_mode():
        rope_table(3, 2, 0.123, x.device)
    f(x).sum().backward()
    assert torch.equal(x.grad, rope_table(3, 2, 0.123, x.device)[:, 0, 0])


@pytest.mark.parametrize(("rows", "length"), [(192, 250), (192, 345), (24, 25), (8, 3), (16, 16)])
def test_resampling_is_the_published_one(rows, length):
    values = torch.randn(1, 2, rows)
    expected = torch.nn.functional.interpolate(values, size=length, mode="nearest-exact")
    assert torch.equal(values[:, :, nearest_rows(rows, length, values.device)], expected)


def test_normalize_and_back():
    net = network()
    latent = torch.randn(2, 5, 4, dtype=torch.float64)
    kept = latent.clone()
    normalized = net.normalize(latent)
    assert torch.equal(latent, kept)
    close(normalized * net.latent_std + net.latent_mean, latent, terms=4)
    close(net.unnormalize(normalized), latent, terms=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(2, 10, 5)}, r"z has shape \(2, 10, 5\)"),
        ({"z": torch.zeros(2, 4)}, "z has shape"),
        ({"z": torch.zeros(2, 0, 4)}, "z has 0 tokens"),
        ({"z": torch.zeros(2, 20_001, 4)}, "z has 20001 tokens"),
        ({"t": torch.zeros(3)}, r"t has shape \(3,\)"),
        ({"r": torch.zeros(2, 1)}, r"r has shape \(2, 1\)"),
        ({"video": torch.zeros(2, 4, 7)}, "video has shape"),
        ({"text": torch.zeros(4, 7)}, "text has shape"),
        ({"sync": torch.zeros(2, 9, 5)}, "sync has 9 features"),
        ({"sync": torch.zeros(2, 20_008, 5)}, "sync has 20008 tokens"),
        ({"video": torch.zeros(3, 4, 6)}, "differ in samples: video 3, sync 2, text 2"),
        ({"z": torch.zeros(3, 10, 4), "r": 0.0, "t": 1.0}, "video has 2 samples and z has 3"),
        ({"video_mask": torch.ones(3, dtype=torch.bool)}, "mask of video"),
        ({"text_mask": torch.ones(2)}, "mask of text"),
    ],
)
def test_bad_inputs_are_named(change, message):
    net = MFMJT.from_config("nano", **SMALL, **DIMS)
    z, r, t, features = inputs(dtype=torch.float32)
    with pytest.raises(InputError, match=message):
        net(**{"z": z, "r": r, "t": t, **features, **change})


def test_conditions_are_given_once():
    net = network()
    z, r, t, features = inputs()
    with pytest.raises(InputError, match="cond comes with features"):
        net(z, r, t, **features, cond=net.conditions(**features))


def test_default_lengths_follow_the_frame_rates():
    small = config_for("small_16k")
    assert small.lengths(250) == (64, 192)
    assert small.lengths(313) == (80, 240)  # 10 s
    assert small.lengths(125) == (32, 88)  # 4 s
    large = config_for("large_44k")
    assert large.lengths(345) == (64, 192)
    assert config_for("nano").lengths(250) == (64, 200)
    assert config_for("nano").lengths(80) == (20, 64)
    assert config_for("nano").lengths(1) == (1, 8)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("tiny", {}, "No configuration 'tiny'"),
        ("nano", {"hiden_dim": 3}, "No configuration field hiden_dim"),
        ("nano", {"hidden_dim": 0}, "hidden_dim is 0"),
        ("nano", {"num_heads": 3}, "num_heads 3"),
        ("nano", {"fused_depth": 6}, "at least one block"),
        ("nano", {"sync_length": 12}, "multiple of 8"),
    ],
)
def test_bad_configurations_are_named(name, overrides, message):
    with pytest.raises(InputError, match=message):
        MFMJT.from_config(name, **overrides)


def test_tables_of_real_and_of_fake_tensors_do_not_meet():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    def run():
        net = MFMJT.from_config("nano", hidden_dim=16, num_heads=1, depth=2, fused_depth=1)
        zero = torch.zeros(1)
        return net(torch.zeros(1, 20, net.config.latent_dim), zero, zero)

    run()
    with FakeTensorMode():
        assert isinstance(run(), FakeTensor)
    assert not isinstance(run(), FakeTensor)


def test_times_are_embedded_at_their_scale():
    sizes = {"hidden_dim": 32, "num_heads": 1, "depth": 2, "fused_depth": 1}
    plain = MFMJT.from_config("nano", **sizes).double()
    fast = MFMJT.from_config("nano", **sizes, time_scale=1000.0).double()
    for embedding in (plain.r_embed, plain.t_embed):  # the one of t - r begins at zero
        torch.nn.init.normal_(embedding.mlp[2].weight)
    fast.load_state_dict(plain.state_dict())
    t = torch.rand(5, dtype=torch.float64)
    for name in ("t_embed", "r_embed"):
        embedded, expected = getattr(fast, name)(t), getattr(plain, name)(1000 * t)
        # Angles of up to 1,000 rad in float64.
        torch.testing.assert_close(embedded, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("positions", ["rotary", "none", "sinusoidal", "learned"])
def test_positions(positions):
    """Only without positions does a network not notice that its tokens are in another order."""
    sizes = {"hidden_dim": 32, "num_heads": 1, "depth": 2, "fused_depth": 1}
    net = MFMJT.from_config("nano", **sizes, positions=positions)
    for name, parameter in net.named_parameters():
        if name == "sync_pos_emb":
            continue  # zero
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
        if parameter.ndim == 3:  # convolutions see neighbors
            middle = parameter.shape[2] // 2
            with torch.no_grad():
                parameter[..., :middle] = parameter[..., middle + 1 :] = 0
    z, r, t = torch.randn(2, 20, 20), torch.zeros(2), torch.ones(2)
    turned = net(z.flip(1), r, t).flip(1)
    assert torch.allclose(net(z, r, t), turned, atol=1e-5) is (positions == "none")
    far = net(torch.randn(1, 300, 20), 0.0, 1.0)  # longer than the reference duration
    assert far.isfinite().all()
    if positions in ("sinusoidal", "learned"):
        with pytest.raises(InputError, match="cannot be prepared"):
            net.frozen()


@pytest.mark.parametrize("positions", ["none", "sinusoidal", "learned"])
def test_positions_have_no_tangent_of_their_own(positions):
    sizes = {"hidden_dim": 32, "num_heads": 1, "depth": 2, "fused_depth": 1}
    net = MFMJT.from_config("nano", **sizes, positions=positions).double()
    for parameter in net.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    x, noise = torch.randn(2, 4, 20, 20, dtype=torch.float64)
    r, t = torch.tensor([0.1, 0.2, 0.5, 0.6]).double(), torch.tensor([0.9, 0.8, 0.5, 0.6]).double()
    found = meanflow.loss(net, x, noise=noise, r=r, t=t)
    torch.testing.assert_close(found, meanflow.loss_ref(net, x, {}, noise, r, t))
