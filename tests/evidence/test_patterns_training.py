"""Training on patterns: resuming, starting from an exported file, and the model's attention."""

import csv
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from demo.autoencoder import Autoencoder
from evidence.patterns import train
from evidence.patterns.attention import Attention, begin_with_similar, mean_attention
from evidence.patterns.looks import agreement, decode, invent, scenes_with_repeats
from evidence.patterns.scenes import WORDS, caption, random_scene
from evidence.patterns.train import SIZE, START, TIMESTEPS, WORLD, Observer, Probe, trained_so_far, write
from evidence.training import recipe
from evidence.training.export import load_snapshot
from evidence.training.networks import Diffusion, Stage
from evidence.training.words import LENGTH, make_tokenizer
from tests.method_helpers import generator, randn

STAGES = (
    Stage(24, batch=7, fresh=16, steps=2, rate=1e-3, fall=0.5, focus=(200, 800)),
    Stage(40, batch=3, fresh=8, steps=2, rate=7e-4, fall=1.0, focus=(200, 800)),
)
TINY = replace(SIZE, autoencoder=16, unet=(32, 96), context=64, autoencoder_batch=3, autoencoder_steps=1, stages=STAGES)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Use a small pool of latents, and one thread because the number of threads affects the last bits of a sum."""
    monkeypatch.setattr(recipe, "POOL", 16)
    monkeypatch.setattr(recipe, "SCALED_BY", 8)
    monkeypatch.setattr(train, "EVERY", 2)
    monkeypatch.setattr(train, "HELD", 3)
    threads, handlers = torch.get_num_threads(), {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def trained(folder, size=TINY):
    folder.mkdir(exist_ok=True)
    return train.train(size, folder, Observer(size, folder / "losses.csv"))


def same(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_train_resumed_after_sigterm_is_bit_identical(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole")
    broken = tmp_path / "broken"

    def counted(run):  # a signal arrives in the middle of every step
        for chance in generators(run):
            os.kill(os.getpid(), signal.SIGTERM)
            yield chance

    generators = recipe.Run.generators
    monkeypatch.setattr(recipe.Run, "generators", counted)
    for after in ("autoencoder.pt saved after step 1", *(f"diffusion.pt saved after step {n}" for n in (1, 2, 3))):
        with pytest.raises(SystemExit, match=after):
            trained(broken)
    monkeypatch.setattr(recipe.Run, "generators", generators)
    again = trained(broken)
    assert same(whole[0], again[0]) and same(whole[1], again[1]) and whole[2] == again[2]
    rows = list(csv.reader((broken / "losses.csv").open()))
    assert [row[:2] for row in rows] == [["step", "picture"], ["2", "24"], ["4", "40"]]
    assert all(float(loss) > 0 for row in rows[1:] for loss in row[3:]) and len(rows[1]) == 3 + 2 * len(TIMESTEPS)


def test_train_starts_from_an_exported_file(tmp_path):
    first = replace(TINY, stages=(STAGES[0], replace(STAGES[1], steps=1)))
    autoencoder, diffusion, _ = trained(tmp_path / "first", first)
    path = tmp_path / "snapshot.safetensors"
    write(path, first, autoencoder, diffusion, 3)
    kept, begun, steps = load_snapshot(path, TINY, WORDS)
    assert steps == 3
    for one, other in ((kept, autoencoder), (begun, diffusion)):
        for name, value in one.state_dict().items():
            assert_close(value.float(), other.state_dict()[name].float(), rtol=1e-3, atol=1e-4)
    folder = tmp_path / "second"
    folder.mkdir()
    (folder / START).write_bytes(path.read_bytes())
    continued = trained(folder)
    assert same(continued[0], kept) and not same(continued[1], begun)
    state = torch.load(folder / "diffusion.pt", weights_only=True)
    assert state["done"] == 4 and state["average"]["n_averaged"] == 4
    for one, other in zip(trained_so_far(TINY, folder)[:2], continued[:2], strict=True):
        assert same(one, other)


def test_trained_so_far_names_the_missing_training(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no training: .* python -m evidence\.patterns\.train"):
        trained_so_far(TINY, tmp_path)


def test_world_returns_pictures_with_their_captions():
    picture, words = WORLD.example(7, 40)
    scene = random_scene(generator(7), 10, 10)
    assert words == caption(scene) and torch.equal(picture, scene.draw(40))
    assert max(len(WORLD.example(number, 8)[1].split()) for number in range(300)) + 3 + 2 <= LENGTH


@pytest.fixture
def diffusion():
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        return Diffusion(TINY, make_tokenizer(WORDS)).eval().requires_grad_(False)


def test_attention_matches_diffusers(diffusion):
    x, t, context = randn(2, 4, 10, 14), torch.tensor([21, 700]), randn(2, LENGTH, 64, seed=1)
    expected = diffusion.unet(x, t, context).sample
    diffusion.unet.set_attn_processor(Attention())
    assert_close(diffusion.unet(x, t, context).sample, expected, rtol=1e-4, atol=1e-5)


def test_begin_with_similar_attends_to_repeats(diffusion):
    """Tokens that repeat every 5 attend more to their repeats than to all others together; random weights do not."""
    attention = diffusion.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    tokens = torch.nn.functional.layer_norm(randn(1, 5, 32), (32,)).repeat(1, 7, 1)

    def share_of_repeats():
        weights = (attention.to_q(tokens) @ attention.to_k(tokens).mT / 16**0.5).softmax(-1)
        alike = torch.arange(35) % 5 == torch.arange(35)[:, None] % 5
        return weights[0][alike].sum() / 35

    assert share_of_repeats() < 0.4
    begin_with_similar(diffusion.unet)
    assert share_of_repeats() > 0.6


def test_mean_attention_replaces_the_finest_self_attention_and_leaves_no_trace(diffusion):
    unet, seen = diffusion.unet, {}

    def keep(name):
        return lambda module, inputs, output: seen.__setitem__(name, output)

    for name, module in unet.named_modules():
        if name.endswith(".attn1"):
            module.register_forward_hook(keep(name))
    x, t, context = randn(2, 4, 10, 14), torch.tensor([21, 700]), randn(2, LENGTH, 64, seed=1)
    before = unet(x, t, context).sample
    with mean_attention(unet):
        unet(x, t, context)
    flat = {name for name, output in seen.items() if (output - output[:, :1]).abs().max() < 1e-6}
    assert flat == {name for name in seen if name.startswith(("down_blocks.0.", "up_blocks.1."))} and len(flat) == 3
    assert torch.equal(unet(x, t, context).sample, before)


def test_probe_losses_are_deterministic(diffusion, monkeypatch):
    monkeypatch.setattr(train, "HELD", 11)
    autoencoder = Autoencoder(16).eval().requires_grad_(False)
    probe = Probe(autoencoder, 1.3, 24)
    losses = probe.losses(diffusion)
    assert losses == probe.losses(diffusion) and len(set(losses)) == 2 * len(TIMESTEPS)
    noise = recipe.draw_noise(probe.latents.shape, generator(500))
    exact = lambda noisy, timesteps, tokens: noise[:8] if len(noisy) == 8 else noise[8:]  # noqa: E731
    assert probe.loss(exact, 500) == 0


def test_invent_returns_the_latents_of_an_exact_model():
    """A model with exact predictions returns the latents with any guidance."""
    latents = randn(3, 4, 5, 7)
    signal_left = train.alphas()

    def knows(x, timesteps, tokens):
        left = signal_left[timesteps][:, None, None, None]
        return (x - left.sqrt() * latents) / (1 - left).sqrt()

    words = ["a red star on a blue ground"] * 3
    assert_close(invent(knows, latents, words, seed=1), latents, rtol=1e-3, atol=1e-3)


def test_agreement_is_high_for_drawn_scenes_and_low_for_noise():
    scenes = scenes_with_repeats(3, 32)
    drawn = agreement(torch.stack([scene.draw(128) for scene in scenes]), scenes)
    assert drawn["tiles"] > 0.9 and drawn["twins"] > 0.6
    assert max(drawn["tiles, chance"], drawn["twins, chance"]) < 0.5
    noise = agreement(torch.rand(3, 3, 128, 128, generator=generator()), scenes)
    assert max(noise.values()) < 0.3


def test_decode_stays_within_range():
    assert decode(Autoencoder(16), 100 * randn(1, 4, 5, 7)).aminmax() == (0, 1)
