"""Small random checkpoints and ControlNets that ComfyUI's stock loaders accept.

They are untrained and spare the tests a download. Text encoders are complete (ComfyUI leaves missing weights
uninitialised), the UNet is the family's with fewer and shallower levels, the autoencoder is TAESD with hand-set weights
that shrinks and enlarges pictures.

Random matrices are overlapping views of a short random storage (`weight[o, i] = storage[o + i]`), and `torch.save`
writes the storage only: 350 million parameters become a file of a few MiB. In memory they are full-sized.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cove.files import atomic_write


@dataclass(frozen=True)
class Text:
    """A CLIP text tower: key prefix, width, layers, and whether keys follow OpenCLIP or transformers."""

    prefix: str
    width: int
    layers: int
    open_clip: bool = False


@dataclass(frozen=True)
class Family:
    """The properties by which ComfyUI detects a checkpoint's family.

    levels: per resolution, channels and the transformer depth of each ResNet block (0: no attention).
    passthrough: share of the input latent in the model's output; 1 suits noise prediction, 0 v-prediction.
    """

    levels: tuple[tuple[int, tuple[int, ...]], ...]
    context: int
    linear: bool
    texts: tuple[Text, ...]
    latent_scale: float = 0.18215
    vector: int | None = None
    passthrough: float = 1.0

    @property
    def v_prediction(self) -> bool:
        return self.passthrough == 0.0


_SD1 = Text("cond_stage_model.transformer.text_model.", 768, 12)
_SD2 = Text("cond_stage_model.model.", 1024, 24, open_clip=True)
_SDXL = (
    Text("conditioner.embedders.0.transformer.text_model.", 768, 12),
    Text("conditioner.embedders.1.model.", 1280, 32, open_clip=True),
)
_TWO_LEVELS = ((320, (1,)), (640, (1,)))

FAMILIES = {
    "sd15": Family(_TWO_LEVELS, 768, False, (_SD1,)),
    "sd21": Family(_TWO_LEVELS, 1024, True, (_SD2,)),
    "sd21v": Family(_TWO_LEVELS, 1024, True, (_SD2,), passthrough=0.0),
    # SDXL is recognised by its transformer depths alone; 0, 2, 5 (KOALA's) is the shallowest set ComfyUI knows.
    "sdxl": Family(((320, (0,)), (640, (2,)), (640, (5,))), 2048, True, _SDXL, latent_scale=0.13025, vector=2816),
}


def write_checkpoint(path: str | Path, kind: str, seed: int = 0) -> Path:
    """Write a random checkpoint of one of `FAMILIES` for `CheckpointLoaderSimple`.

    The UNet returns its normalised input plus a small random function of latent, time, text and control, close to the
    ideal output for data that is Gaussian noise. DDIM sampling therefore reverses DDIM inversion, and prompts change
    the picture, without meaning. `vae_weights` describes the autoencoder.

    Args:
        path: file to write, ending in .ckpt; written atomically.
        kind: "sd15", "sd21" (noise prediction), "sd21v" (v-prediction) or "sdxl".
        seed: seed of every random weight.
    """
    family = _family(kind, FAMILIES)
    weights = RandomWeights(seed)
    _unet(weights, "model.diffusion_model.", family)
    for text in family.texts:
        _text_encoder(weights, text)
    vae = {f"first_stage_model.{name}": weight for name, weight in vae_weights(family.latent_scale).items()}
    return _save(weights.tensors | vae, path)


def write_controlnet(path: str | Path, kind: str, seed: int = 0) -> Path:
    """Write a random ControlNet of the same topology for `ControlNetLoader`.

    Its output convolutions are not zero, so it affects the UNet without training.

    Args:
        path: file to write, ending in .pth; written atomically.
        kind: "sd15" or "sdxl".
        seed: seed of every random weight.
    """
    family = _family(kind, ("sd15", "sdxl"))
    weights = RandomWeights(seed)
    skips, middle = _encoder(weights, "", family)
    for index, channels in enumerate(skips):
        weights.conv(f"zero_convs.{index}.0", channels, channels, 1, gain=0.1)
    weights.conv("middle_block_out.0", middle, middle, 1, gain=0.1)
    widths = (3, 16, 16, 32, 32, 96, 96, 256, 320)
    for index, (inner, outer) in enumerate(zip(widths, widths[1:], strict=False)):
        weights.conv(f"input_hint_block.{2 * index}", outer, inner, 3, gain=2.0)
    return _save(weights.tensors, path)


class RandomWeights:
    """Collect named tensors: random matrices of standard deviation gain / sqrt(fan in), zero biases, unit norms."""

    def __init__(self, seed: int):
        self.tensors: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = torch.float32

    def random(self, *shape: int, std: float) -> Tensor:
        """Return random numbers, [outer, inner, *kernel]; rows and columns share one short storage, kernels do not."""
        kernel = math.prod(shape[2:])
        storage = torch.randn((shape[0] + shape[1]) * kernel, generator=self.generator) * std
        inside = [math.prod(shape[axis + 1 :]) for axis in range(2, len(shape))]
        return storage.to(self.dtype).as_strided(shape, (kernel, kernel, *inside))

    def linear(self, name: str, outer: int, inner: int, gain: float = 1.0, bias: bool = True) -> None:
        self.tensors[f"{name}.weight"] = self.random(outer, inner, std=gain / math.sqrt(inner))
        if bias:
            self.tensors[f"{name}.bias"] = self.constant(0.0, outer)

    def conv(self, name: str, outer: int, inner: int, size: int, gain: float = 1.0) -> None:
        std = gain / math.sqrt(inner * size * size)
        self.tensors[f"{name}.weight"] = self.random(outer, inner, size, size, std=std)
        self.tensors[f"{name}.bias"] = self.constant(0.0, outer)

    def norm(self, name: str, channels: int) -> None:
        self.tensors[f"{name}.weight"] = self.constant(1.0, channels)
        self.tensors[f"{name}.bias"] = self.constant(0.0, channels)

    def constant(self, value: float, *shape: int) -> Tensor:
        return torch.full((1,), value, dtype=self.dtype).expand(shape)


# The strength of each branch, set by trial: large enough for an effect, small enough for a reversible inversion.
_RESNET, _TRANSFORMER, _PROMPT = 0.3, 0.3, 0.15


def _resnet(weights: RandomWeights, name: str, inner: int, outer: int) -> None:
    weights.norm(f"{name}.in_layers.0", inner)
    weights.conv(f"{name}.in_layers.2", outer, inner, 3)
    weights.linear(f"{name}.emb_layers.1", outer, 1280)
    weights.norm(f"{name}.out_layers.0", outer)
    weights.conv(f"{name}.out_layers.3", outer, outer, 3, gain=_RESNET)
    if inner != outer:
        weights.conv(f"{name}.skip_connection", outer, inner, 1, gain=_RESNET)


def _transformer(weights: RandomWeights, name: str, channels: int, depth: int, family: Family) -> None:
    def projection(which: str, gain: float) -> None:
        if family.linear:
            weights.linear(f"{name}.{which}", channels, channels, gain)
        else:
            weights.conv(f"{name}.{which}", channels, channels, 1, gain)

    weights.norm(f"{name}.norm", channels)
    projection("proj_in", 1.0)
    for index in range(depth):
        block = f"{name}.transformer_blocks.{index}"
        for attention, context, gain in (("attn1", channels, 1.0), ("attn2", family.context, _PROMPT)):
            weights.linear(f"{block}.{attention}.to_q", channels, channels, bias=False)
            weights.linear(f"{block}.{attention}.to_k", channels, context, bias=False)
            weights.linear(f"{block}.{attention}.to_v", channels, context, bias=False)
            weights.linear(f"{block}.{attention}.to_out.0", channels, channels, gain)
        weights.linear(f"{block}.ff.net.0.proj", 8 * channels, channels)
        weights.linear(f"{block}.ff.net.2", channels, 4 * channels)
        for norm in ("norm1", "norm2", "norm3"):
            weights.norm(f"{block}.{norm}", channels)
    projection("proj_out", _TRANSFORMER)


def _encoder(weights: RandomWeights, prefix: str, family: Family) -> tuple[list[int], int]:
    """Add the encoder that UNet and ControlNet share; return the channels of every skip connection and the middle."""
    embeddings = [("time_embed", 320, 1.0)]
    if family.vector:  # pooled text and picture sizes
        embeddings.append(("label_emb.0", family.vector, _PROMPT))
    for name, size, gain in embeddings:
        weights.linear(f"{prefix}{name}.0", 1280, size)
        weights.linear(f"{prefix}{name}.2", 1280, 1280, gain)
    weights.conv(f"{prefix}input_blocks.0.0", 320, 4, 3)
    skips = [320]
    for level, (channels, depths) in enumerate(family.levels):
        for depth in depths:
            name = f"{prefix}input_blocks.{len(skips)}"
            _resnet(weights, f"{name}.0", skips[-1], channels)
            if depth:
                _transformer(weights, f"{name}.1", channels, depth, family)
            skips.append(channels)
        if level < len(family.levels) - 1:
            weights.conv(f"{prefix}input_blocks.{len(skips)}.0.op", channels, channels, 3)
            skips.append(channels)
    middle = skips[-1]
    _resnet(weights, f"{prefix}middle_block.0", middle, middle)
    _transformer(weights, f"{prefix}middle_block.1", middle, 1, family)
    _resnet(weights, f"{prefix}middle_block.2", middle, middle)
    return skips, middle


def _unet(weights: RandomWeights, prefix: str, family: Family) -> None:
    skips, current = _encoder(weights, prefix, family)
    index = 0
    for level, (channels, depths) in reversed(list(enumerate(family.levels))):
        for block in range(len(depths) + 1):
            name = f"{prefix}output_blocks.{index}"
            _resnet(weights, f"{name}.0", current + skips.pop(), channels)
            attends = any(depths)
            if attends:
                _transformer(weights, f"{name}.1", channels, 1, family)
            if level and block == len(depths):
                weights.conv(f"{name}.{1 + attends}.conv", channels, channels, 3)
            current, index = channels, index + 1
    weights.norm(f"{prefix}out.0", 320)
    weights.conv(f"{prefix}out.2", 4, 320, 3, gain=0.3)
    _pass_latent_through(weights.tensors, prefix, f"{prefix}output_blocks.{index - 1}.0", family.passthrough)
    if family.v_prediction:  # ComfyUI detects SD2's v-models by the spread of this bias; nothing else reads it here
        marker = torch.tensor([-0.2, 0.2]).repeat(160)
        weights.tensors[f"{prefix}output_blocks.11.1.transformer_blocks.0.norm1.bias"] = marker


def _pass_latent_through(tensors: dict[str, Tensor], prefix: str, last: str, share: float) -> None:
    """Make the UNet return `share` * its normalised latent plus its random part.

    The first convolution copies the latent and its negative to channels 0-7; the last skip connection returns its
    channels in reverse order (a single spike in an overlapping view); the head takes the difference of each pair, and
    silu(x) - silu(-x) = x.
    """
    copies = tensors[f"{prefix}input_blocks.0.0.weight"].contiguous()
    copies[:8] = 0
    copies[range(8), [0, 1, 2, 3] * 2, 1, 1] = torch.tensor([1.0] * 4 + [-1.0] * 4)
    tensors[f"{prefix}input_blocks.0.0.weight"] = copies

    skip = tensors[f"{last}.skip_connection.weight"]
    skip[0, skip.shape[1] - 1] = 1.0  # one number of the storage is the whole antidiagonal

    head = tensors[f"{prefix}out.2.weight"].contiguous()
    head[range(4), [319, 318, 317, 316], 1, 1] += share
    head[range(4), [315, 314, 313, 312], 1, 1] -= share
    tensors[f"{prefix}out.2.weight"] = head


def _text_encoder(weights: RandomWeights, text: Text) -> None:
    names = {"token": "embeddings.token_embedding.weight", "position": "embeddings.position_embedding.weight"}
    names |= {"layer": "encoder.layers.{}.", "norms": ("layer_norm1", "layer_norm2"), "out": "self_attn.out_proj"}
    names |= {"mlp": ("mlp.fc1", "mlp.fc2"), "final": "final_layer_norm"}
    if text.open_clip:
        names = {"token": "token_embedding.weight", "position": "positional_embedding"}
        names |= {"layer": "transformer.resblocks.{}.", "norms": ("ln_1", "ln_2"), "out": "attn.out_proj"}
        names |= {"mlp": ("mlp.c_fc", "mlp.c_proj"), "final": "ln_final"}

    weights.dtype = torch.float16  # ComfyUI's own choice for text encoders
    width, prefix = text.width, text.prefix
    weights.tensors[prefix + names["token"]] = weights.random(49408, width, std=1.0)
    weights.tensors[prefix + names["position"]] = weights.random(77, width, std=0.3)
    for index in range(text.layers):
        layer = prefix + names["layer"].format(index)
        for norm in names["norms"]:
            weights.norm(layer + norm, width)
        if text.open_clip:
            weights.tensors[f"{layer}attn.in_proj_weight"] = weights.random(3 * width, width, std=width**-0.5)
            weights.tensors[f"{layer}attn.in_proj_bias"] = weights.constant(0.0, 3 * width)
        else:
            for projection in ("q_proj", "k_proj", "v_proj"):
                weights.linear(f"{layer}self_attn.{projection}", width, width)
        weights.linear(layer + names["out"], width, width, gain=0.3)
        weights.linear(layer + names["mlp"][0], 4 * width, width)
        weights.linear(layer + names["mlp"][1], width, 4 * width, gain=0.3)
    weights.norm(prefix + names["final"], width)
    if text.open_clip:
        weights.tensors[prefix + "text_projection"] = weights.random(width, width, std=width**-0.5)
    weights.dtype = torch.float32


def vae_weights(latent_scale: float, contrast: float = 3.0) -> dict[str, Tensor]:
    """Return TAESD weights set by hand: encode averages 8x8 pixels, decode enlarges them bilinearly.

    Latent channels 0-2 are (colour - 0.5) * contrast, channel 3 their mean. Decoding returns the picture at an eighth
    of its resolution, with strong colours slightly compressed (TAESD's decoder starts with a tanh).

    Args:
        latent_scale: the family's factor between the autoencoder's latents and the UNet's.
    """
    tensors: dict[str, Tensor] = {}

    def conv(name: str, outer: int, inner: int, bias: bool = True) -> None:
        tensors[f"{name}.weight"] = torch.zeros(1).expand(outer, inner, 3, 3)
        if bias:
            tensors[f"{name}.bias"] = torch.zeros(1).expand(outer)

    def open(name: str) -> Tensor:  # a constant is stored as one number until it is written to
        tensors[name] = tensors[name].contiguous()
        return tensors[name]

    def spread(name: str, taps: tuple[float, float, float], channels: int) -> None:
        taps_1d = torch.tensor(taps)
        open(f"{name}.weight")[range(channels), range(channels)] = torch.outer(taps_1d, taps_1d)

    def block(name: str) -> None:
        for layer in (0, 2, 4):
            conv(f"{name}.conv.{layer}", 64, 64)

    encoder, decoder = "taesd_encoder", "taesd_decoder"
    conv(f"{encoder}.0", 64, 3)
    open(f"{encoder}.0.weight")[range(3), range(3), 1, 1] = 1.0
    block(f"{encoder}.1")
    for stage in (2, 6, 10):
        conv(f"{encoder}.{stage}", 64, 64, bias=False)
        spread(f"{encoder}.{stage}", (0.0, 0.5, 0.5), 3)  # mean of two pixels
        for index in range(stage + 1, stage + 4):
            block(f"{encoder}.{index}")
    conv(f"{encoder}.14", 4, 64)
    open(f"{encoder}.14.weight")[range(3), range(3), 1, 1] = contrast
    tensors[f"{encoder}.14.weight"][3, :3, 1, 1] = contrast / 3
    open(f"{encoder}.14.bias")[:] = -0.5 * contrast

    conv(f"{decoder}.1", 64, 4)
    open(f"{decoder}.1.weight")[range(3), range(3), 1, 1] = 1 / contrast
    open(f"{decoder}.1.bias")[:4] = torch.tensor([0.5, 0.5, 0.5, 1.0])  # channel 3 is the coverage of a pixel
    for index in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        block(f"{decoder}.{index}")
    for stage in (7, 12, 17):
        conv(f"{decoder}.{stage}", 64, 64, bias=False)
        spread(f"{decoder}.{stage}", (0.25, 0.5, 0.25), 4)
        _mend_border(tensors, f"{decoder}.{stage + 1}.conv", open)
    conv(f"{decoder}.19", 3, 64)
    open(f"{decoder}.19.weight")[range(3), range(3), 1, 1] = 1.0

    tensors["vae_scale"] = torch.tensor(latent_scale)
    tensors["vae_shift"] = torch.tensor(0.0)
    return tensors


def _mend_border(tensors: dict[str, Tensor], name: str, open) -> None:
    """Restore in one TAESD block the loss from zero padding at the border: 1/4 at an edge, 7/16 at a corner.

    Channel 3 was one everywhere before the smoothing, so 1 minus it is the loss. Two gates (edge and corner, corner
    only) pass the colours where the loss exceeds a threshold; a share of each is added.
    """
    big = 16.0  # saturates the gates; colours are at most about 1
    thresholds, shares = (0.15, 0.35), (4 / 3 - 1, 16 / 9 - 4 / 3)
    first, first_bias = open(f"{name}.0.weight"), open(f"{name}.0.bias")
    second, third = open(f"{name}.2.weight"), open(f"{name}.4.weight")
    for gate, (threshold, share) in enumerate(zip(thresholds, shares, strict=True)):
        level = 16 + gate  # the gate's opening, without a colour
        first[level, 3, 1, 1], first_bias[level] = -big, big * (1 - threshold)
        for colour in range(3):
            unit = 4 + 4 * gate + colour
            first[unit, colour, 1, 1], first[unit, 3, 1, 1] = 1.0, -big
            first_bias[unit] = big * (1 - threshold)
            second[unit, unit, 1, 1], second[unit, level, 1, 1] = 1.0, -1.0
            third[colour, unit, 1, 1] = share
    first[20, 3, 1, 1], first_bias[20] = -1.0, 1.0
    second[20, 20, 1, 1] = third[3, 20, 1, 1] = 1.0


def _family(kind: str, kinds) -> Family:
    if kind not in kinds:
        raise ValueError(f"no random model of kind {kind!r}; choose one of {', '.join(kinds)}")
    return FAMILIES[kind]


def _save(tensors: dict[str, Tensor], path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        torch.save({"state_dict": tensors}, temporary)
    return path
