"""The training recipe, on shapes: reproducible, resumable, and ComfyUI loads the trained networks."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import evidence.patterns.train
from demo.autoencoder import Autoencoder
from evidence.shapes.scenes import WORDS, caption
from evidence.shapes.train import SIZE, WORLD, scene
from evidence.training import recipe
from evidence.training.export import export, half
from evidence.training.networks import Stage, encode
from evidence.training.words import LENGTH, UNKNOWN, make_tokenizer, roughen, tokens_of
from tests.method_helpers import generator, randn

CAPTION = "a dotted yellow ring and a black cross on a tiled purple ground"
STEPS = 4
CPU = torch.device("cpu")
# The topology of the real model, with small sizes that all differ.
STAGES = (
    Stage(24, batch=7, fresh=32, steps=1, rate=1e-3, fall=0.5, focus=(500, 1000)),
    Stage(40, batch=3, fresh=16, steps=STEPS - 1, rate=7e-4, fall=1.0, focus=(300, 700)),
)
TINY = replace(SIZE, unet=(32, 96), context=64, autoencoder_batch=3, autoencoder_steps=STEPS, stages=STAGES)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(recipe, "POOL", 64)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread because the number of threads affects the last bits of a sum."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(folder, size=TINY):
    """Train both networks; return them and the latents' scale."""
    folder.mkdir(exist_ok=True)
    autoencoder = recipe.train_autoencoder(size, WORLD, folder, CPU)
    return autoencoder, *recipe.train_diffusion(size, WORLD, autoencoder, folder, CPU)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An exported file of briefly trained networks, these networks, the scale and pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "POOL", 64)
        autoencoder, diffusion, scale = trained(tmp_path_factory.mktemp("training"))
    pictures = WORLD.pictures(range(5), TINY.picture)
    path = tmp_path_factory.mktemp("demo") / "tiny.safetensors"
    export(path, TINY, make_tokenizer(WORDS), autoencoder, diffusion, scale, pictures)
    for network in (autoencoder, diffusion):
        for parameter in network.parameters():
            parameter.copy_(half(parameter))
    return path, autoencoder, diffusion, scale, pictures


def weights(*networks):
    return [parameter for network in networks for parameter in network.parameters()]


def test_train_autoencoder_and_diffusion_resumed_are_bit_identical(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole")
    again = trained(tmp_path / "again")
    assert all(map(torch.equal, weights(*whole[:2]), weights(*again[:2]))), "the seed does not decide everything"

    class Stopped(Exception):
        pass

    broken = tmp_path / "broken"
    saves = []

    def save_then_stop(run, save=recipe.Run.save):
        save(run)
        saves.append(run.path.stem)
        raise Stopped

    monkeypatch.setattr(recipe, "SAVE_EVERY", 0)  # after every step
    monkeypatch.setattr(recipe.Run, "save", save_then_stop)
    for _ in range(2 * STEPS):
        with pytest.raises(Stopped):
            trained(broken)
    monkeypatch.undo()
    monkeypatch.setattr(recipe, "POOL", 64)
    assert saves == ["autoencoder"] * STEPS + ["diffusion"] * STEPS
    piecewise = trained(broken)
    assert all(map(torch.equal, weights(*whole[:2]), weights(*piecewise[:2])))
    assert whole[2] == piecewise[2]


def test_train_diffusion_feeds_latents_of_unit_variance(tmp_path, monkeypatch):
    """The variances of scaled latents and scaled noise add up to 1 at every timestep."""
    seen = []

    class Watched(recipe.Diffusion):
        def forward(self, noisy, timesteps, tokens):
            seen.append(noisy)
            return super().forward(noisy, timesteps, tokens)

    monkeypatch.setattr(recipe, "Diffusion", Watched)
    trained(tmp_path, replace(TINY, stages=(replace(STAGES[1], batch=64, fresh=32, steps=STEPS),)))
    assert torch.cat(seen).std().item() == pytest.approx(1, abs=0.1)


def test_train_diffusion_runs_the_stages_in_order(tmp_path, monkeypatch):
    seen, starts = [], []

    class Noted(recipe.Pool):
        def __init__(self, stage, world, autoencoder, start):
            starts.append(start)
            super().__init__(stage, world, autoencoder, start)

    class Watched(recipe.Diffusion):
        def forward(self, noisy, timesteps, tokens):
            seen.append(tuple(noisy.shape))
            return super().forward(noisy, timesteps, tokens)

    monkeypatch.setattr(recipe, "Diffusion", Watched)
    monkeypatch.setattr(recipe, "Pool", Noted)
    trained(tmp_path)
    assert starts == [0, STAGES[0].steps * STAGES[0].fresh]  # no stage begins with scenes of another
    assert seen == [(7, 4, 6, 6), *[(3, 4, 10, 10)] * (STEPS - 1)]
    assert [recipe.stage_at(STAGES, step) for step in range(STEPS)] == [
        (0, 0),
        *((1, step) for step in range(STEPS - 1)),
    ]
    with pytest.raises(ValueError, match="after the last stage"):
        recipe.stage_at(STAGES, STEPS)


def test_pool_move_adds_new_pictures_at_every_step():
    autoencoder = Autoencoder(8)
    pool, later = (recipe.Pool(STAGES[1], WORLD, autoencoder, start) for start in (0, 3 * 16))
    for _ in range(3):
        pool.move()
    assert torch.equal(pool.latents, later.latents) and pool.captions == later.captions
    assert pool.latents.shape == (64, 4, 10, 10) and pool.next == 64 + 3 * 16
    assert set(pool.captions) == {caption(scene(number)) for number in range(48, 112)}


def test_draw_noise_has_a_random_mean():
    noise = recipe.draw_noise((500, 4, 10, 10), generator(1))
    assert noise.std().item() == pytest.approx((1 + recipe.OFFSET**2) ** 0.5, abs=0.01)
    assert noise.mean((2, 3)).std().item() == pytest.approx((1 / 100 + recipe.OFFSET**2) ** 0.5, rel=0.05)
    assert (noise - noise.mean((2, 3), keepdim=True)).std().item() == pytest.approx(1, abs=0.01)


def test_draw_timesteps_draws_half_from_the_focus():
    timesteps = recipe.draw_timesteps(40_000, (300, 700), generator(1))
    inside = (timesteps >= 300) & (timesteps < 700)
    assert inside.float().mean().item() == pytest.approx((1 + 0.4) / 2, abs=0.01)
    assert timesteps.min() == 0 and timesteps.max() == 999
    assert (timesteps < 100).float().mean().item() == pytest.approx(0.05, abs=0.005)


def test_falling_warms_up_and_decreases():
    rates = [recipe.falling(2e-3, 1000, step, 0.5) for step in range(1000)]
    assert rates[0] == 2e-3 / 100 and rates[99] == rates[100] == 2e-3 == max(rates)
    assert all(one > other for one, other in zip(rates[100:-1], rates[101:], strict=True))
    assert rates[550] == pytest.approx(2e-3 * (1 + 0.5**0.5) / 2) and rates[-1] == pytest.approx(1e-3, rel=0.01)
    assert 0 < recipe.falling(2e-3, 1000, 999) < 1e-7


def test_train_diffusion_uses_the_learning_rate_of_each_stage(tmp_path, monkeypatch):
    seen = []

    class Watched(torch.optim.AdamW):
        def step(self, *arguments, **options):
            seen.append(self.param_groups[0]["lr"])
            return super().step(*arguments, **options)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    trained(tmp_path)
    first, rest = seen[STEPS], seen[STEPS + 1 :]  # after those of the autoencoder
    assert first == 1e-3 and rest == [recipe.falling(7e-4, STEPS - 1, step) for step in range(STEPS - 1)]
    assert rest[0] == 7e-4


def test_loss_weight_is_the_clamped_picture_error():
    """Weight times the error of the noise = the error of the picture times a ratio clamped to 0.05..5."""
    left = torch.tensor([0.99, 0.75, 0.5, 0.01])
    expected = torch.tensor([5 / 99, 1.0, 1.0, 0.05 * 99])
    assert_close(recipe.loss_weight(left), expected)


@pytest.mark.parametrize("size", [SIZE, evidence.patterns.train.SIZE], ids=["shapes", "patterns"])
def test_size_channels_are_readable_by_comfyui(size):
    assert all(channels % size.unet[0] == 0 for channels in size.unet) and size.unet[0] % 64 == 0


def test_tokens_of_encodes_captions():
    tokenizer = make_tokenizer(WORDS)
    tokens = tokens_of(tokenizer, [CAPTION, "", "A RED, star! on-a houseboat", "star " * 30])
    assert tokens.shape == (4, LENGTH)
    start, end, unknown = (tokenizer.token_to_id(mark) for mark in ("<start>", "<end>", UNKNOWN))
    words = [tokenizer.id_to_token(number) for number in tokens[0].tolist()]
    assert words[1 : words.index("<end>")] == CAPTION.split()
    assert tokens[1].tolist() == [start] + [end] * (LENGTH - 1)
    assert tokens[3].tolist() == [start, *[tokenizer.token_to_id("star")] * (LENGTH - 2), end]
    expected = [start, *map(tokenizer.token_to_id, ["a", "red", "star", "on", "a"]), unknown]
    assert tokens[2].tolist() == expected + [end] * (LENGTH - len(expected))


def test_caption_of_maximal_length_fits_the_tokenizer():
    longest = "a checkered orange triangle and a checkered orange triangle on a cloudy orange ground"
    most = max(len(caption(scene(number)).split()) for number in range(500))
    assert most == len(longest.split())
    assert most + 3 + 2 <= LENGTH


def test_roughen_drops_words_like_a_user():
    chance = generator(2)
    rough = [roughen(CAPTION, chance) for _ in range(2000)]
    assert sum(one == "" for one in rough) == pytest.approx(200, abs=50)
    assert sum(one != "" and "ground" not in one for one in rough) == pytest.approx(180, abs=50)
    assert sum(UNKNOWN in one for one in rough) == pytest.approx(360, abs=70)
    known = {" ".join(word for word in one.split() if word != UNKNOWN) for one in rough}
    assert known == {"", CAPTION, CAPTION[: CAPTION.index(" on ")]}


def test_train_diffusion_takes_no_step_when_finished(finished, tmp_path, monkeypatch):
    """Running the command again on a finished folder takes no step."""
    trained(tmp_path)
    monkeypatch.setattr(recipe.Run, "generators", lambda run: iter(range(run.done, run.steps)))
    monkeypatch.setattr(recipe, "Pool", None)
    autoencoder, diffusion, scale = trained(tmp_path)
    assert scale == finished[3]
    assert all(not parameter.requires_grad for parameter in weights(autoencoder, diffusion))


@pytest.fixture
def loaded(finished, nodes):
    module = sys.modules[nodes["LoadDemoModel"].__module__]
    with torch.inference_mode():
        yield module.load_demo(finished[0])


def test_load_demo_text_encoder_matches_training(finished, loaded):
    text, clip = finished[2].text, loaded[1]
    with torch.no_grad():
        expected = text(tokens_of(make_tokenizer(WORDS), [CAPTION])).last_hidden_state
    found = clip.encode_from_tokens_scheduled(clip.tokenize(CAPTION.upper() + "!"))[0][0]
    assert_close(found, expected)


def test_load_demo_unet_matches_training(finished, loaded):
    unet, model = finished[2].unet, loaded[0].model
    x, context = randn(2, 4, 10, 10), randn(2, LENGTH, TINY.context, seed=1)
    timesteps = torch.tensor([21, 700])
    with torch.no_grad():
        expected = unet(x, timesteps, context).sample
    found = model.diffusion_model(x, timesteps, context=context)
    assert expected.abs().max() > 0.1
    assert_close(found, expected)


def test_load_demo_sigmas_match_training(loaded):
    sampling = loaded[0].model.model_sampling
    signal = recipe.alphas()
    assert_close(sampling.sigmas.float().cpu(), ((1 - signal) / signal).sqrt(), rtol=1e-4, atol=1e-5)


def test_load_demo_autoencoder_matches_training(finished, loaded):
    _, autoencoder, _, scale, pictures = finished
    vae, model = loaded[2], loaded[0].model
    found = vae.encode(pictures.permute(0, 2, 3, 1))
    with torch.no_grad():
        expected = autoencoder.encode(pictures * 2 - 1)
        back = autoencoder.decode(expected)
    assert found.shape == (5, 4, 10, 10)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert_close(vae.decode(expected), (back / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    assert_close(model.process_latent_in(expected), expected * scale)


def test_load_demo_previews_show_the_colours(finished, loaded):
    """Within the limits of a linear map of four latent channels, and in RGB order."""
    _, autoencoder, _, scale, pictures = finished
    latents, form = encode(autoencoder, pictures) * scale, loaded[0].model.latent_format
    seen = torch.einsum("nchw,cr->nrhw", latents, torch.tensor(form.latent_rgb_factors))
    seen = seen + torch.tensor(form.latent_rgb_factors_bias)[:, None, None]
    small = torch.nn.functional.adaptive_avg_pool2d(pictures, 10) * 2 - 1
    assert_close((seen - small).mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-2)
    assert (seen - small).square().mean() < (small - small.mean((0, 2, 3), keepdim=True)).square().mean()
