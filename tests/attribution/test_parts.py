"""Exact patches of heads, channels and neurons, against hooks on the modules themselves."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from fasttrace import Probe, Tracer
from fasttrace.adapters.scope import scope
from fasttrace.attribution.parts import Part, Parts, part_of
from fasttrace.attribution.readings import readings_of
from fasttrace.engine.base import CLEAN, CORRUPT
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.errors import UsageError
from fasttrace.metrics.latent import recovery
from fasttrace.types import MetricContext

PROBE = Probe("a photo of a red dog", "dog", negative_prompt="a car")
LEVELS = ("head", "channel", "neuron")


class Asked:
    """A plan of one pair, its readings, and the pair as the engines see it."""

    def __init__(self, pipe, **asked):
        self.tracer = Tracer(pipe)
        self.plan = self.tracer.plan(PROBE, steps=3, metric="latent_recovery", **asked)
        self.model = self.tracer.model
        with scope(self.model.pipe):
            self.pair = self.tracer._pair(self.plan, PROBE, [self.plan.rows[0]])
            engine = self.tracer.engine
            marks = engine.denoiser(self.plan.sampling, self.pair.texts[CLEAN]).marks
        sites = list(dict.fromkeys(row.lane.patches[0].site for row in self.plan.rows))
        self.readings = {r.key: r for r in readings_of(marks, sites, ("site", *LEVELS))}

    def exact(self, groups, lanes=16, window=None):
        parts = Parts(self.model, self.tracer.engine, self.plan, lanes, window)
        with scope(self.model.pipe):
            [found] = parts.effects(PROBE, self.pair, groups).values()
        return found, parts.runs

    def rows(self):
        return {row.site: row.effect for row, _ in self.tracer.iter_rows(self.plan, pictures=False)}


def module_of(model, mark):
    """(module, whether its input is meant) of a mark: heads go into `to_out`, hidden into the last
    linear of a feed-forward."""
    name, _, part = mark.rpartition(".")
    modules = model.unet_modules()
    if part == "heads":
        return modules[name].to_out[0], True
    if part == "hidden":
        return modules[name].net[2], True
    return modules[mark], False


def by_hooks(asked, group, branch, window=(0, 99)):
    """The effect of one group with hooks on the modules, run after run."""
    model, pair = asked.model, asked.pair
    engine = ReferenceEngine(model)
    kept, call = {}, [0]
    guided = model.guided(asked.plan.sampling)
    rows = slice(None) if branch == "both" or not guided else slice(1, 2)

    def run(text, on):
        with ExitStack() as hooks, scope(model.pipe):
            count = model.unet.register_forward_pre_hook(lambda *_: call.append(call.pop() + 1))
            hooks.callback(count.remove)
            for part in group:
                module, inward = module_of(model, part.mark)
                handle = (
                    module.register_forward_pre_hook(lambda _m, args, p=part: (on(p, args[0]),))
                    if inward
                    else module.register_forward_hook(lambda _m, _args, out, p=part: on(p, out))
                )
                hooks.callback(handle.remove)
            call[0] = 0
            return engine.denoise("patched", pair.texts[text], pair)

    def keep(part, value):
        kept[part, call[0]] = value.clone()
        return value

    def write(part, value):
        if not window[0] <= call[0] - 1 < window[1]:
            return value
        new = value.clone()
        own = list(part.channels)
        axis = 1 if value.ndim == 4 else 2
        if axis == 1:
            new[rows, own] = kept[part, call[0]][rows, own]
        else:
            new[rows, :, own] = kept[part, call[0]][rows, :, own]
        return new

    clean = run(CLEAN, keep)
    corrupt = run(CORRUPT, lambda _part, value: value)
    patched = run(CORRUPT, write)
    context = MetricContext(PROBE, None, clean, corrupt)
    above, below = (float(recovery(latents, context)) for latents in (patched, corrupt))
    return above - below


def some(asked, axis, count=3, seed=0):
    """Parts drawn over all sites."""
    every = [(r, i) for r in asked.readings.values() if r.axis == axis for i in range(r.size)]
    drawn = np.random.default_rng(seed).choice(len(every), count, replace=False)
    return [part_of(*every[i]) for i in drawn]


@pytest.mark.parametrize("branch", ["cond", "both"])
def test_as_hooks_do_it(tiny, branch):
    asked = Asked(tiny, branch=branch)
    parts = [part for axis in LEVELS for part in some(asked, axis)]
    groups = [[part] for part in parts] + [parts[:2], parts[1:7], parts]
    found, runs = asked.exact(groups, lanes=5)
    expected = [by_hooks(asked, group, branch) for group in groups]
    assert np.abs(expected).min() > 0
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max(), rtol=2e-4)
    assert runs == 7 + 7 + 7  # 12 groups by fives, with clean and corrupt


@pytest.mark.parametrize("window", [(0, 1), (1, 3), (3, 4)])
def test_in_a_window(sd, window):
    asked = Asked(sd)
    assert asked.plan.calls == 4
    groups = [[part] for axis in LEVELS for part in some(asked, axis)]
    found, _ = asked.exact(groups, window=window)
    expected = [by_hooks(asked, group, "cond", window) for group in groups]
    atol = 2e-4 * np.abs(expected).max() + 4 * np.finfo(np.float32).eps  # of scores about 1
    np.testing.assert_allclose(found, expected, atol=atol, rtol=2e-4)
    whole, _ = asked.exact(groups)
    assert np.abs(whole - found).max() > 1e-2 * np.abs(whole).max()


def test_all_of_a_site_is_the_site(sd):
    asked = Asked(sd)
    rows = asked.rows()
    groups, names = [], []
    for reading in asked.readings.values():
        if reading.axis == "channel" or (reading.axis == "head" and reading.size > 1):
            groups.append([part_of(reading, i) for i in range(reading.size)])
            names.append(reading.site)
    found, _ = asked.exact(groups)
    expected = np.array([rows[name] for name in names])
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


def test_parts_of_one_mark_join(sd):
    asked = Asked(sd)
    reading = next(r for r in asked.readings.values() if r.axis == "head")
    one, other = part_of(reading, 0), part_of(reading, 1)
    both = Part(reading.mark, one.channels + other.channels)
    found, _ = asked.exact([[one, other], [other, one], [both], [one]])
    assert found[0] == found[1] == found[2] != found[3]


def test_nothing_is_left_behind(sd):
    """A step is used again: what one group patched is not in the next one."""
    asked = Asked(sd)
    parts = some(asked, "channel", 4)
    alone = [asked.exact([[part]])[0][0] for part in parts]
    together, _ = asked.exact([[part] for part in [*parts, *parts]], lanes=3)
    np.testing.assert_allclose(together, alone * 2, rtol=1e-3, atol=1e-6)


def test_what_is_no_part(sd):
    asked = Asked(sd)
    whole = next(r for r in asked.readings.values() if r.axis == "all")
    with pytest.raises(UsageError, match="can't be patched as a part"):
        part_of(whole, 0)
    with pytest.raises(UsageError, match="no parts"):
        asked.exact([[]])
    assert torch.is_grad_enabled()
