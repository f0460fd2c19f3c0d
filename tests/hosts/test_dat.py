"""The Dual Aggregation Transformer against an independent implementation, its shared tensors, and its errors."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.attention import listening
from esper.hosts.dat import DAT, PRESETS, build, spec_of
from esper.hosts.dat import windows as sizes
from esper.hosts.dat.windows import Pool, cut, join
from esper.runtime.errors import ConfigError

Make = Callable[..., Any]

PUBLISHED = {"dat": 14_802_051, "dat_s": 11_212_131, "dat_2": 11_212_131, "dat_light": 572_766}

VARIANTS = {
    "both shifts": {"depth": (4, 3)},
    "1conv, in steps": {"residual": "1conv", "upsampler": "pixelshuffle", "scale": 4},
    "by 3": {"upsampler": "pixelshuffle", "scale": 3, "depth": (3,)},
    "wide windows": {"split": (4, 16), "depth": (3, 1)},
    "tall windows": {"split": (16, 8), "depth": (1, 1), "heads": (2, 4)},
    "grey, without biases": {"channels": 1, "qkv_bias": False, "dim": 64, "heads": 4, "expansion": 1.5},
}


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def shapes(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}


# ---- as the reference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_the_other_preset_has_424k_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build("tiny", 2).parameters()) == 423_928
    assert {*PRESETS} == {*PUBLISHED, "tiny"}


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED)])
def test_presets_are_those_of_the_reference(name: str, theirs: Make, randomise: Make, image: Make) -> None:
    reference, model = randomise(theirs(spec_of(name))), build(name).eval()
    assert shapes(model) == shapes(reference)
    for key, value in reference.state_dict().items():
        if key.split(".")[-1] in ("rpe_biases", "relative_position_index", "attn_mask_0", "attn_mask_1"):
            assert torch.equal(model.state_dict()[key], value), key
    model.load_state_dict(reference.state_dict(), strict=True)
    x = image(1, 20, 12)
    expected = reference(x)
    close(model(x), expected)
    again = theirs(spec_of(name))
    again.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in reference.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (32, 32), (20, 37)], ids=str)
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_outputs_are_those_of_the_reference(
    changes: dict[str, Any], size: tuple[int, int], small: Make, theirs: Make, image: Make
) -> None:
    model = small(**changes)
    reference = theirs(model.spec)
    reference.load_state_dict(model.state_dict(), strict=True)
    x = image(2, *size, channels=model.spec.channels)
    expected = reference(x)
    assert expected.std() > 0.1
    close(model(x), expected)


@torch.no_grad()
def test_light_windows_over_several_images(theirs: Make, randomise: Make, image: Make) -> None:
    model = randomise(build("dat_light", 2, depth=(3,))).eval()
    reference = theirs(model.spec)
    reference.load_state_dict(model.state_dict(), strict=True)
    x = image(2, 40, 52)
    close(model(x), reference(x))


def test_training_is_that_of_the_reference(
    small: Make, theirs: Make, image: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In float64: batch normalisation over two values makes gradients that rounding changes by more than is asked here.
    # The reference casts its position biases to float32, and keeps the mean colour in it.
    model = small(depth=(4, 1)).train().double()
    reference = theirs(model.spec).train().double()
    reference.load_state_dict(model.state_dict(), strict=True)
    reference.mean = model.mean[None]
    x, factor = image(2, 20, 24).double(), image(2, 40, 48).double()
    outputs = [model(x)]
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        outputs.append(reference(x))
    close(*outputs)
    for output in outputs:
        (output * factor).sum().backward()
    expected = {name: value.grad for name, value in reference.named_parameters()}
    for name, value in model.named_parameters():
        # Some gradients are 0.
        assert (value.grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-9, name
    for name, value in reference.state_dict().items():
        close(model.state_dict()[name], value)  # running statistics


@torch.no_grad()
@pytest.mark.parametrize("part", ["pos.pos3.2.weight", "temperature", "channel_interaction.4.weight"])
def test_random_weights_show_what_is_missing(part: str, small: Make, image: Make) -> None:
    model, x = small(depth=(2,)), image(1, 16, 16)
    before = model(x)
    for name, value in model.named_parameters():
        if name.endswith(part):
            value.zero_()
    assert (model(x) - before).abs().max() > 1e-3


# ---- attention -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (20, 12)], ids=str)
def test_backends_agree(size: tuple[int, int], small: Make, image: Make) -> None:
    automatic, x = small(depth=(3,)), image(2, *size)
    outputs = []
    for name in ("reference", "sdpa"):
        model = build("tiny", 2, depth=(3,), img_size=16, attention=name).eval()
        model.load_state_dict(automatic.state_dict())
        outputs.append(model(x))
        close(outputs[-1], automatic(x))
    assert not torch.equal(*outputs)


@torch.no_grad()
def test_attention_is_told_what_it_computes(image: Make) -> None:
    model = build("tiny", 2, depth=(3,), dim=32, heads=4, attention="reference").eval()
    chosen: list[Any] = []
    with listening(chosen.append):
        model(image(1, 24, 24))
    told = {(each.spec.kind, each.spec.mask, each.spec.bias) for each in chosen}
    assert told <= {("windowed", None, True), ("windowed", "additive", True), ("channel", None, False)}
    assert {(each.backend, each.source) for each in chosen} <= {("reference", "call")}


@torch.no_grad()
def test_an_image_does_not_see_the_others(small: Make, image: Make) -> None:
    model, x = small(depth=(3,)), image(3, 20, 12)
    close(model(x)[1:2], model(x[1:2]))


# ---- tensors of sizes alone ------------------------------------------------------------------------------------------


def test_blocks_share_masks_and_indices(image: Make) -> None:
    model, other = build("tiny", 2, depth=(3, 3)), build("tiny", 4, depth=(3,))
    shifted = [b.attn for m in (model, other) for b in m.blocks if b.kind == "shifted"]
    branches = [branch for m in (model, other) for b in m.blocks if b.kind != "channel" for branch in b.attn.attns]
    assert len(shifted) == 3
    for tensors in (
        [a.attn_mask_0 for a in shifted] + [a.attn_mask_1 for a in shifted],  # square windows
        [b.relative_position_index for b in branches],
        [b.rpe_biases for b in branches],
    ):
        assert len({id(tensor) for tensor in tensors}) == 1
    x = image(1, 40, 24)
    assert model.masks(x)[0] is model.masks(image(2, 33, 17))[1]
    assert build("tiny", 2, depth=(2,)).masks(x) is None


@torch.no_grad()
def test_forward_passes_add_one_mask_for_each_size(small: Make, image: Make) -> None:
    model = small(depth=(3, 3), split=(4, 8))
    for _ in range(2):
        sizes.masks = Pool(8)
        for size in ((24, 16), (24, 15), (23, 9)):
            model(image(1, *size))
            assert len(sizes.masks) == 2


def test_a_pool_keeps_what_was_used_last() -> None:
    pool, built = Pool(2), []

    def build(number: int) -> Tensor:
        built.append(number)
        return torch.full((1,), number)

    for number in (0, 1, 0, 2, 0, 1):
        assert pool.get(build, number).item() == number
    assert built == [0, 1, 2, 1]
    assert len(pool) == 2


def test_a_state_dict_does_not_write_to_what_is_shared(small: Make) -> None:
    model = small(depth=(3,))
    state = {key: value + 1 for key, value in model.state_dict().items()}
    mask, index = model.blocks[2].attn.attn_mask_0.clone(), model.blocks[0].attn.attns[0].relative_position_index
    before = index.clone()
    model.load_state_dict(state, strict=True)
    assert torch.equal(model.blocks[2].attn.attn_mask_0, mask)
    assert torch.equal(index, before)
    close(model.conv_first.weight, state["conv_first.weight"], 0)


def test_masks_of_another_image_size_are_welcome_and_other_windows_are_not(small: Make) -> None:
    model = small(depth=(3,))
    model.load_state_dict(small(depth=(3,), img_size=32).state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="relative_position_index"):
        model.load_state_dict(small(depth=(3,), split=(4, 8)).state_dict())
    state = model.state_dict()
    del state["layers.0.blocks.2.attn.attn_mask_1"]
    with pytest.raises(RuntimeError, match="attn_mask_1"):
        model.load_state_dict(state)


@torch.no_grad()
def test_moved_models_share_as_well(small: Make, image: Make) -> None:
    model, x = small(depth=(3, 1)), image(1, 20, 12)
    double = copy.deepcopy(model).double()
    shifted = [b.attn for b in double.blocks if b.kind == "shifted"]
    assert shifted[0].attn_mask_0 is shifted[1].attn_mask_0
    assert shifted[0].attn_mask_0.dtype == torch.float64
    assert double.mean.dtype == torch.float64
    close(double(x.double()).float(), model(x))
    with torch.device("meta"):
        empty = build("tiny", 2, depth=(3, 1), img_size=16).eval()
    assert empty.mean.is_meta
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty(x), model(x))


@torch.no_grad()
def test_it_runs_under_inference_mode_and_autocast_and_can_be_pickled(small: Make, image: Make) -> None:
    model, x = small(depth=(3,)), image(2, 16, 16)
    sizes.masks = Pool(8)
    with torch.inference_mode():
        expected = model(x)
    with torch.enable_grad():
        model(x).sum().backward()  # the masks were made under inference mode
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, atol=0.3, rtol=0.1)


def test_cut_windows_can_be_joined() -> None:
    x = torch.arange(2 * 8 * 12 * 3).view(2, 8, 12, 3)
    parts = cut(x, (4, 6))
    assert parts.shape == (8, 24, 3)
    assert torch.equal(parts[5], x[1, :4, 6:].reshape(24, 3))
    assert torch.equal(join(parts, (8, 12), (4, 6)), x)


# ---- training --------------------------------------------------------------------------------------------------------


def test_one_image_is_not_a_batch_to_train_on(small: Make, image: Make) -> None:
    model, x = small().train(), image(1, 16, 16)
    with pytest.raises(ConfigError, match=r"batch=1.*at least 2 images"):
        model(x)
    model(image(2, 16, 16))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model(x)


@torch.no_grad()
def test_stochastic_depth_skips_images(small: Make) -> None:
    model = small(depth=(4,), drop_path=0.9)
    assert [block.drop for block in model.blocks] == pytest.approx([0, 0.3, 0.6, 0.9])
    block, x = model.blocks[3], torch.randn(200, 2, 2, 96)
    biases = block.attn.biases()
    whole = block.plain(x, None, None, biases)
    assert torch.equal(block(x, None), whole)
    block.training = True  # its batch normalisation goes on with its running statistics
    torch.manual_seed(0)
    skipped = (block(x, None) == x).flatten(1).all(1)
    assert 0.9**2 * 200 - 25 < skipped.sum() < 0.9**2 * 200 + 25
    kept = torch.tensor([[2.0], [0.0]]).view(2, 1, 1, 1, 1).expand(-1, 200, -1, -1, -1)
    close(block.plain(x, None, kept, biases), x + 2 * block.attn(block.norm1(x), None, biases))


def test_the_preset_for_growth_has_no_chance_in_it(image: Make) -> None:
    torch.manual_seed(0)
    model, x = build("tiny", 2).train(), image(2, 16, 16)
    assert torch.equal(model(x), model(x))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "dat_xl"}, "dat.name=dat_xl: choose one of dat, dat_s"),
        ({"scale": 5, "name": "dat"}, "dat.scale=5: choose 3 or a power of 2"),
        ({"scale": 0}, "dat.scale=0: must be a whole number above 0"),
        ({"scale": 2.0}, "dat.scale=2.0: must be a whole number"),
        ({"colour": 1}, "dat.colour=1: there is no such key; choose one of scale, dim"),
        ({"dim": 100}, "dat.heads=6: every number must be even, above 0 and divide dim=100"),
        ({"dim": 30}, "dat.dim=30: must be even and at least 32"),
        ({"heads": 3}, "dat.heads=3: every number must be even"),
        ({"heads": 0}, "dat.heads=0: every number must be even"),
        ({"name": "dat", "depth": [2] * 4, "heads": [3, 6, 12, 24]}, "dat.heads=(3, 6, 12, 24): every number"),
        ({"heads": (6,)}, "dat.heads=(6,): give one number, or one for each of the 2 groups"),
        ({"depth": ()}, "dat.depth=(): needs at least one group"),
        ({"depth": (2, 0)}, "dat.depth=0: must be a whole number above 0"),
        ({"depth": 2}, "dat.depth=2: give the number of blocks of each group"),
        ({"split": (8, 12)}, "dat.split=(8, 12): give two whole numbers"),
        ({"split": (1, 8)}, "dat.split=(1, 8): give two whole numbers"),
        ({"split": 8}, "dat.split=8: give two whole numbers"),
        ({"split": (8,)}, "dat.split=(8,): give two whole numbers"),
        ({"img_size": 60}, "dat.img_size=60: must be a multiple of 8"),
        ({"expansion": 0.01}, "dat.expansion=0.01: dim=96 times it must be even and above 0, not 0"),
        ({"residual": "2conv"}, "dat.residual=2conv: choose one of 1conv, 3conv"),
        ({"upsampler": "nearest"}, "dat.upsampler=nearest: choose one of pixelshuffle"),
        ({"drop_path": 1.0}, "dat.drop_path=1.0: must be at least 0 and below 1"),
        ({"attention": "fast"}, "backend=fast: choose one of auto, reference"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(**{"name": "tiny", "scale": 2, **changes})
    assert str(error.value).startswith(message)


def test_lists_are_as_good_as_tuples() -> None:
    with torch.device("meta"):
        assert isinstance(build("tiny", 2, depth=[2, 1], heads=[2, 4], split=[4, 8]), DAT)
