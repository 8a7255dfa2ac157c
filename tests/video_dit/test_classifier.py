"""The classifier of noisy latents: samples do not mix, whatever shape they have; labels; folders; led generation."""

import dataclasses
import json
import math

import pytest
import torch
from random_pipeline import save_random_pipeline

from video_dit.classifier import (
    UNKNOWN,
    ClassifierBatch,
    LatentClassifier,
    LatentClassifierConfig,
    class_log_prob,
    classifier_loss,
    pack_log_prob,
    sample_classes,
)
from video_dit.diffusion.classifier_guidance import with_classifier
from video_dit.diffusion.sampling import sample
from video_dit.diffusion.schedules import RectifiedFlow
from video_dit.generator import GenerationRequest, Generator
from video_dit.model import VideoDiT
from video_dit.packing import pack
from video_dit.shapes import Stride

CLASSES = {"colour": ("red", "green", "blue"), "speed": ("slow", "fast")}
SIZES = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "freq_dim": 16, "ffn_dim": 48}
CONFIG = LatentClassifierConfig(classes=CLASSES, num_layers=2, **SIZES)
SHAPES = [(2, 4, 6), (1, 4, 4), (3, 2, 4), (2, 4, 6)]


def make_classifier(std=0.3):
    torch.manual_seed(0)
    classifier = LatentClassifier(CONFIG)
    torch.nn.init.normal_(classifier.transformer.head.out.weight, std=std)
    return classifier.eval()


def make_latents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, *shape, generator=generator) for shape in SHAPES]


def pack_of(latents, timesteps=(900.0, 100.0, 500.0, 300.0), text_dim=5):
    texts = [torch.randn(2 + place, text_dim) for place in range(len(latents))]
    return pack(latents, list(timesteps)[: len(latents)], texts)


LABELS = torch.tensor([[0, 1], [2, UNKNOWN], [1, 0], [2, 1]])


def test_logits_are_a_samples_own_and_in_the_callers_order():
    classifier, latents = make_classifier(), make_latents()
    together = classifier(pack_of(latents))
    assert {name: tuple(values.shape) for name, values in together.items()} == {"colour": (4, 3), "speed": (4, 2)}
    for place, timestep in enumerate((900.0, 100.0, 500.0, 300.0)):
        alone = classifier(pack_of([latents[place]], [timestep]))
        for name, values in alone.items():
            torch.testing.assert_close(together[name][place], values[0], rtol=1e-4, atol=1e-5)
    assert together["colour"].std(0).min() > 0.01  # they do differ


def test_logits_are_the_mean_of_the_transformers_votes_and_the_text_plays_no_part():
    classifier, latents = make_classifier(), make_latents()
    packed = pack_of(latents)
    logits = classifier(packed)
    votes = packed.unpack(classifier.transformer(packed.with_texts([torch.zeros(1, 1)] * 4)))
    for place, sample_votes in enumerate(votes):
        both = torch.cat([logits["colour"][place], logits["speed"][place]])
        torch.testing.assert_close(both, sample_votes.mean((1, 2, 3)))
    for values, again in zip(logits.values(), classifier(pack_of(latents, text_dim=9)).values(), strict=True):
        assert torch.equal(values, again)


def test_the_noise_level_matters():
    classifier, latents = make_classifier(), make_latents()
    logits = [classifier(pack_of(latents, [timestep] * 4))["colour"] for timestep in (0.0, 800.0)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_log_prob_sums_the_attributes_that_are_known():
    logits = {"colour": torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), "speed": torch.tensor([[4.0, 1.0]] * 2)}
    found = class_log_prob(logits, torch.tensor([[2, 0], [1, UNKNOWN]]))
    first = 3 - math.log(sum(map(math.exp, (1, 2, 3)))) + 4 - math.log(math.exp(4) + math.exp(1))
    torch.testing.assert_close(found, torch.tensor([first, -math.log(3)]))


def test_an_untrained_classifier_knows_nothing():
    batch = ClassifierBatch(pack_of(make_latents()), LABELS)
    loss = classifier_loss(LatentClassifier(CONFIG), batch)
    assert loss.item() == pytest.approx(4 * math.log(3) + 3 * math.log(2), rel=1e-5)


def test_labels_are_places_in_the_table():
    samples = [{"colour": "blue", "speed": None}, {"speed": "fast"}, {}]
    assert CONFIG.labels(samples).tolist() == [[2, UNKNOWN], [UNKNOWN, 1], [UNKNOWN, UNKNOWN]]
    assert CONFIG.labels([]).shape == (0, 2)
    with pytest.raises(ValueError, match=r"colour='pink': must be one of \('red', 'green', 'blue'\), or None"):
        CONFIG.labels([{"colour": "pink"}])
    with pytest.raises(ValueError, match=r"taste='sweet': .* must be in \['colour', 'speed'\]"):
        CONFIG.labels([{"taste": "sweet"}])


def test_errors_name_the_field():
    with pytest.raises(ValueError, match="classes={}: must name at least one attribute"):
        LatentClassifierConfig(classes={})
    for names in ((), ("red",), ("red", "red")):
        with pytest.raises(ValueError, match=r"classes\['colour'\]=\(.*\): must be at least two names, all different"):
            LatentClassifierConfig(classes={"colour": names})
    with pytest.raises(ValueError, match="num_layers=0"):
        LatentClassifierConfig(classes=CLASSES, num_layers=0)
    packed = pack([torch.zeros(6, 1, 4, 4)], [0.0], [torch.zeros(1, 3)], Stride(1, 2, 2))
    with pytest.raises(ValueError, match=r"in_channels=4: .* guided model's \(1, 2, 2\) and 6"):
        pack_log_prob(make_classifier(), packed, LABELS[:1])
    packed = pack([torch.zeros(4, 2, 4, 4)], [0.0], [torch.zeros(1, 3)], Stride(2, 2, 2))
    with pytest.raises(ValueError, match=r"patch_size=\(1, 2, 2\), .* guided model's \(2, 2, 2\) and 4"):
        pack_log_prob(make_classifier(), packed, LABELS[:1])


def test_a_folder_gives_the_classifier_back(tmp_path):
    classifier = make_classifier()
    classifier.save_pretrained(str(tmp_path))
    loaded = LatentClassifier.from_pretrained(str(tmp_path))
    assert loaded.config == classifier.config
    assert loaded.state_dict().keys() == classifier.state_dict().keys()
    assert all(torch.equal(value, classifier.state_dict()[name]) for name, value in loaded.state_dict().items())
    written = json.loads((tmp_path / "classifier" / "config.json").read_text())
    assert written["classes"] == {name: list(names) for name, names in CLASSES.items()}
    assert written["_class_name"] == "LatentClassifier"
    (tmp_path / "classifier" / "config.json").write_text(json.dumps({**written, "num_layers": 3}))
    with pytest.raises(ValueError, match="missing: transformer.blocks.2"):
        LatentClassifier.from_pretrained(str(tmp_path))


def gradient_at(classifier, latents, timestep, labels=LABELS):
    tokens_pack = pack_of(latents)
    log_prob = pack_log_prob(classifier, tokens_pack, labels)
    tokens = tokens_pack.tokens.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_prob(tokens, timestep), tokens)
    return tokens_pack.unpack(gradient)


def test_the_gradient_of_a_sample_is_its_own():
    classifier, latents = make_classifier(), make_latents()
    before = gradient_at(classifier, latents, torch.tensor(400.0))
    for place in range(4):
        alone = gradient_at(classifier, [latents[place]], torch.tensor(400.0), LABELS[place : place + 1])
        torch.testing.assert_close(before[place], alone[0], rtol=1e-4, atol=1e-6)
        assert before[place].abs().max() > 1e-5
    changed = [latents[0] + 1, *latents[1:]]
    after = gradient_at(classifier, changed, torch.tensor(400.0))
    assert not torch.allclose(after[0], before[0])
    for place in range(1, 4):
        torch.testing.assert_close(after[place], before[place], rtol=1e-4, atol=1e-6)


def test_timesteps_by_token_are_those_of_their_frames():
    classifier, latents = make_classifier(), make_latents()
    timesteps = [torch.rand(shape[0]) * 1000 for shape in SHAPES]
    packed = pack_of(latents, timesteps)
    log_prob = pack_log_prob(classifier, packed, LABELS)
    by_token = packed.timesteps[packed.frame_of_token][:, None]
    expected = class_log_prob(classifier(packed), LABELS).sum()
    torch.testing.assert_close(log_prob(packed.tokens, by_token.double()), expected)


def test_a_gradient_leads_where_the_classifier_wants():
    """Guided sampling from a model that knows nothing ends with more of log p(labels) than it does unled."""
    classifier, schedule = make_classifier(), RectifiedFlow()
    packed = pack_of(make_latents())
    log_prob = pack_log_prob(classifier, packed, LABELS)

    def end(scale):
        denoise = with_classifier(lambda x, timestep: x, log_prob, schedule, "velocity", scale)
        return log_prob(sample(denoise, packed.tokens, schedule=schedule, num_steps=8), torch.tensor(0.0)).item()

    assert end(0.0) < end(1.0) < end(5.0)


def test_classes_lead_the_generator_and_prompts_do_not(tmp_path):
    save_random_pipeline(tmp_path)
    generator, classifier = Generator.from_pretrained(str(tmp_path)), make_classifier(std=1.0)
    requests = [
        GenerationRequest(prompt=prompt, num_frames=frames, height_px=32, width_px=width, num_steps=3, seed=seed)
        for seed, (prompt, frames, width) in enumerate([("a", 5, 48), ("b", 1, 32)])
    ]
    labels = CONFIG.labels([{"colour": "red", "speed": "fast"}, {"colour": "blue"}])
    untold = [dataclasses.replace(request, prompt="", guidance_scale=1.0) for request in requests]
    for video, expected in zip(
        sample_classes(generator, classifier, requests, labels, 0.0), generator(untold), strict=True
    ):
        assert torch.equal(video, expected)
    led = sample_classes(generator, classifier, requests, labels, 30.0)
    assert [tuple(video.shape) for video in led] == [(5, 32, 48, 3), (1, 32, 32, 3)]
    for video, unled in zip(led, generator(untold), strict=True):
        assert not torch.equal(video, unled)
    (alone,) = sample_classes(generator, classifier, requests[1:], labels[1:], 30.0)
    assert (alone.int() - led[1].int()).abs().max() <= 1
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_it_starts_from_a_diffusion_model_of_its_sizes():
    torch.manual_seed(0)
    dit = VideoDiT(dataclasses.replace(CONFIG.transformer, out_channels=CONFIG.in_channels, text_dim=8))
    classifier = LatentClassifier(CONFIG)
    before = {name: value.clone() for name, value in classifier.transformer.state_dict().items()}
    classifier.start_from(dit)
    theirs = dit.state_dict()
    for name, value in classifier.transformer.state_dict().items():
        is_own = name.startswith(("text_mlp", "head.out"))
        assert torch.equal(value, before[name] if is_own else theirs[name]), name
    with pytest.raises(ValueError, match=r"num_layers=2 \(must be 3\)"):
        classifier.start_from(VideoDiT(dataclasses.replace(dit.config, num_layers=3)))
