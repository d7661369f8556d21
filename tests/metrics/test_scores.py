"""Latent and attribute scores, and how metrics are found."""

from functools import partial

import pytest
import torch

from fasttrace import Metric, Probe
from fasttrace.adapters.pipeline import Model
from fasttrace.errors import ModelError, UsageError
from fasttrace.metrics import latent
from fasttrace.metrics.attribute import AttributeScorer, class_index
from fasttrace.metrics.registry import Metrics, from_callable
from fasttrace.types import MetricContext

DOG = Probe("a photo of a dog", "dog", "object")


def context(clean, corrupt):
    return MetricContext(DOG, clean_latent=clean, corrupt_latent=corrupt)


def test_latent_distance_and_recovery_by_hand():
    clean, corrupt = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 4.0)
    points = torch.cat([clean, corrupt, clean + 1, clean - 8])
    assert latent.distance(points, context(clean, corrupt)).tolist() == [0, 4, 1, 8]
    assert latent.recovery(points, context(clean, corrupt)).tolist() == [1, 0, 0.75, -1]


def test_recovery_where_nothing_was_lost():
    same = torch.zeros(1, 1, 2, 2)
    found = latent.recovery(torch.cat([same, same + 1]), context(same, same))
    assert found.tolist() == [0, 0]


def test_latent_metrics_need_their_runs():
    with pytest.raises(ModelError, match="clean run's latent"):
        latent.distance(torch.zeros(1, 1, 2, 2), MetricContext(DOG))


class Classifier:
    """Stands for the bundled one: probabilities set by the picture's mean."""

    classes = {"object": ["cat", "dog"], "colour": ["red", "dark red", "blue"]}  # noqa: RUF012

    def probabilities(self, pictures):
        mean = pictures.flatten(1).mean(1)
        rest = torch.zeros_like(mean)
        return {
            "object": torch.stack([1 - mean, mean], 1),
            "colour": torch.stack([rest, mean, 1 - mean], 1),
        }


@pytest.mark.parametrize(
    ("attribute", "probe", "expected"),
    [
        (None, DOG, [0, 25]),
        ("object", Probe("a cat", "cat"), [100, 75]),
        ("colour", Probe("a dark red car", "dark red"), [0, 25]),
    ],
)
def test_attribute_score(attribute, probe, expected):
    pictures = torch.tensor([0.0, 0.25]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    found = AttributeScorer(Classifier(), attribute).score(pictures, MetricContext(probe))
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("subject", "index"), [("Dog", 0), ("a big dog", 0), ("dark red", 2), ("dark red dog", 2)]
)
def test_class_of_a_subject(subject, index):
    assert class_index(subject, ["dog", "red", "dark red"]) == index


@pytest.mark.parametrize(
    ("attribute", "probe", "words"),
    [
        ("colours", DOG, "no classifier for 'colours'.*'colour'"),
        (None, Probe("a dog", "dog", "smell"), "has attribute 'smell'"),
        (None, Probe("a dgo", "dgo", "object"), "No class fits the subject 'dgo'.*'dog'"),
    ],
)
def test_attribute_refusals(attribute, probe, words):
    with pytest.raises(UsageError, match=words):
        AttributeScorer(Classifier(), attribute).target(probe)


@pytest.fixture
def metrics(sd):
    return Metrics(Model(sd))


def test_names(metrics, folders):
    asked = ["latent_distance", "latent_recovery", f"clip:{folders['clip']}"]
    found = metrics.resolve(asked, [DOG])
    assert [m.key for m in found] == asked
    assert [m.higher_is_closer for m in found] == [False, True, True]
    assert [m.needs for m in found] == ["latent", "latent", "picture"]
    assert found[2].fingerprint
    assert metrics.resolve(found[0], [DOG]) == found[:1]


def test_a_model_folder_may_bring_its_own_scorer(sd, folders, tmp_path):
    import fasttrace

    folder = tmp_path / "model"
    sd.save_pretrained(folder)
    (folder / "score").symlink_to(folders["clip"])
    (folder / "fasttrace.json").write_text('{"defaults": {"steps": 6}}')
    model = Model(fasttrace.load(str(folder)))
    (score,) = Metrics(model).resolve(None, [DOG])
    assert (score.key, bool(score.fingerprint)) == ("clip_score", True)
    assert model.default("steps") == 6
    assert model.default("guidance") == 7.5


def brightness(pictures):
    return pictures.flatten(1).mean(1)


def test_callables(metrics):
    (metric,) = metrics.resolve(brightness, [DOG])
    assert metric.key == "callable:brightness"
    assert metric.function(torch.ones(2, 3, 4, 4), MetricContext(DOG)).tolist() == [1, 1]
    with_context = from_callable(lambda pictures, context: [len(context.probe.prompt)])
    assert (with_context.key, with_context.label) == ("callable:lambda", "lambda")
    assert with_context.function(torch.ones(1, 3, 4, 4), MetricContext(DOG)) == [16]
    scaled = from_callable(partial(lambda pictures, by: pictures.mean() * by, by=2))
    assert scaled.function(torch.ones(1, 3, 4, 4), MetricContext(DOG)) == 2


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("clip_scor", "Unknown metric 'clip_scor'.*Did you mean 'clip_score'"),
        ([], "list of metrics is empty"),
        (3, "a name, a Metric or a callable"),
        (["latent_distance", "latent_distance"], "same key"),
        ("attribute", "brings no attribute classifiers"),
    ],
)
def test_refusals(metrics, asked, words):
    with pytest.raises(UsageError, match=words):
        metrics.resolve(asked, [DOG])


def test_a_missing_scoring_model_is_a_sentence(metrics, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"'empty' is damaged or incomplete.*another metric"):
        metrics.resolve(f"clip:{tmp_path / 'empty'}", [DOG])
    with pytest.raises(ModelError, match="There is no CLIP model '/nowhere/clip'"):
        metrics.resolve("clip:/nowhere/clip", [DOG])


def test_damaged_classifiers_are_a_sentence(sd, tmp_path):
    import fasttrace

    sd.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "classifiers").mkdir()
    metrics = Metrics(Model(fasttrace.load(str(tmp_path / "model"))))
    with pytest.raises(ModelError, match="attribute classifiers of 'model' are damaged"):
        metrics.resolve("attribute", [DOG])


def test_records_are_frozen_and_compare_by_what_they_say():
    one = Metric("m", "M", brightness)
    assert one == Metric("m", "M", len)
    assert hash(one) == hash(Metric("m", "M", len))
