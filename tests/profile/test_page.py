"""What is made of a profile: a page, a trace file, tables, plain data."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO

import pytest
from rich.console import Console

from fasttrace.profile.page import render
from fasttrace.profile.perfetto import trace_json
from fasttrace.profile.records import Line, Span
from fasttrace.profile.table import WIDTH, print_profile
from fasttrace.profile.words import percent, scaled, seconds, shown

HOSTILE = "</title><script>alert(1)</script>\"'&<img src=x onerror=y> [red]\x1b[31m{{ 7 * 7 }}"


class Reader(HTMLParser):
    """Tags, attributes and text of a page; complains of what isn't closed."""

    VOID = frozenset({"meta", "link", "line", "rect", "polyline", "br"})

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def hostile(profiled):
    return replace(profiled, prompt=HOSTILE, model=HOSTILE, about={"device": HOSTILE})


def test_the_page_stands_alone(profiled):
    page = render(profiled)
    reader = Reader(page)
    assert not {"script", "img", "iframe", "object", "base"} & set(reader.tags)
    assert {value for name, value in reader.attributes if name in ("src", "href")} <= {
        "data:,", "#time", "#sites", "#memory", "#how"
    }  # fmt: skip
    assert not re.search(r"url\(|@import", page.replace("url(#hatch", ""))
    assert ("http-equiv", "Content-Security-Policy") in reader.attributes
    assert not re.search(r"\b(nan|inf|None)\b", "".join(reader.text))


def test_the_page_says_it_all(profiled):
    page = render(profiled)
    text = " ".join("".join(Reader(page).text).split())
    for line in profiled.sites:
        assert line.site in text
    for word in ("ResNets", "cross-attention", "convolution", "operators of no site", "norm"):
        assert word in text
    assert f"{profiled.lanes_a_second:.3g} lanes a second" in text
    assert percent(profiled.work.sharing) in text
    assert "equal those without the clock, bit for bit" in text
    assert page.count("<polyline") == 1


def test_a_hostile_prompt_is_text(hostile):
    page = render(hostile)
    reader = Reader(page)
    assert "script" not in reader.tags
    assert "onerror" not in dict(reader.attributes)
    assert HOSTILE in "".join(reader.text)


def test_a_hostile_prompt_does_nothing_to_a_terminal(hostile):
    stream = StringIO()
    print_profile(hostile, Console(file=stream, width=WIDTH, highlight=False), sites=3)
    assert "\x1b" not in stream.getvalue()
    assert "[red]" in stream.getvalue()
    assert shown("a\nb\u202e") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"


def test_a_difference_is_shown(profiled):
    other = replace(profiled, costs=replace(profiled.costs, same=False))
    assert "The scores of the run with the clock differ" in render(other)
    assert "The scores of the run with the clock differ" not in render(profiled)


def test_the_tables(profiled):
    stream = StringIO()
    print_profile(profiled, Console(file=stream, width=WIDTH, highlight=False), sites=3)
    lines = stream.getvalue().splitlines()
    slowest = max(profiled.sites, key=lambda line: line.seconds)
    assert sum(line.lstrip().startswith("unet.") for line in lines) == 3
    assert any(slowest.site in line and percent(slowest.share) in line for line in lines)
    assert max(map(len, lines)) < 250


def test_a_profile_of_no_site(profiled):
    """As of text-encoder lanes: there may be no memory reading either."""
    bare = replace(profiled, sites=(), memory=(), alive=None)
    assert "#sites" not in render(bare)
    assert "<polyline" not in render(bare)
    print_profile(bare, Console(file=StringIO(), width=80), sites=12)


# ---- the trace file


def test_the_trace_is_one_that_viewers_open(profiled):
    """The format's rules: known phases, numbers of microseconds, spans in one another or apart."""
    trace = json.loads(trace_json(profiled))
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == {"X", "M", "C"}
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(profiled.spans)
    open_until: list[tuple[float, str]] = []
    last = 0.0
    for event in spans:
        start, stop = event["ts"], event["ts"] + event["dur"]
        assert 0 <= last <= start <= stop
        last = start
        while open_until and open_until[-1] <= start + 1e-6:
            open_until.pop()
        assert not open_until or stop <= open_until[-1] + 1e-6, event
        open_until.append(stop)
    assert [event["name"] for event in spans if event["cat"] == "run"] == ["run"]
    steps = [event for event in spans if event["cat"] == "step"]
    assert len(steps) == profiled.steps
    own = {event["name"] for event in spans if event["cat"] == "site"}
    assert {line.site for line in profiled.sites} <= own
    counts = [event for event in events if event["ph"] == "C"]
    assert [event["args"]["bytes"] for event in counts] == [size for _, size in profiled.memory]


def test_a_trace_in_the_order_of_its_nesting(profiled):
    """run, batch, step, site: each begins inside the one before."""
    spans = profiled.spans
    for inner, outer in (("batch", "run"), ("step", "batch"), ("site", "step"), ("op", "site")):
        outers = [span for span in spans if span.kind == outer]
        for span in (span for span in spans if span.kind == inner):
            assert any(o.start <= span.start and span.stop <= o.stop for o in outers), span


def test_device_spans_have_a_track(profiled):
    spans = (
        Span("step", "call 0", 5000, 9000, {}, device=True),
        Span("run", "run", 2000, 9500, {}),
    )
    events = json.loads(trace_json(replace(profiled, spans=spans)))["traceEvents"]
    found = [(e["name"], e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert found == [("run", 1, 0, 7.5), ("call 0", 2, 3, 4)]
    assert ("thread_name", "device") in [(e["name"], e["args"].get("name")) for e in events]


# ---- plain data and words


def test_plain_data(profiled):
    data = json.loads(json.dumps(profiled.as_data(), allow_nan=False))
    assert data["lanes"] == profiled.lanes
    assert {line["name"] for line in data["kinds"]} == {line.name for line in profiled.kinds}
    assert data["sites"][0]["site"] == profiled.sites[0].site
    assert "spans" not in data
    resnet = next(line for line in data["kinds"] if line["name"] == "resnet")
    assert resnet["of_gemm"] == pytest.approx(
        resnet["flops"] / resnet["seconds"] / data["ceilings"]["gemm"]["float32"]["highest"]
    )


def test_what_binds():
    """1e9 FLOPs at 1e10 a second, 1e9 bytes at 1e9 a second: a second of memory."""
    line = Line("a", 1, seconds=4.0, share=1.0, flops=10**9, bytes=10**9)
    assert line.least(1e10, 1e9) == (1.0, "memory")
    assert line.least(1e8, 1e9) == (10.0, "arithmetic")
    assert Line("a", 1, 4.0, 1.0).least(1e10, 1e9) is None
    assert (line.flop_rate, line.byte_rate) == (2.5e8, 2.5e8)


@pytest.mark.parametrize(
    ("number", "words"),
    [(None, ""), (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (123456, "123 kB"),
     (12.34e9, "12.3 GB"), (999.9e9, "1.00 TB"), (3.2e18, "3,200 PB")],
)  # fmt: skip
def test_amounts(number, words):
    assert scaled(number, "B") == words


@pytest.mark.parametrize(
    ("number", "words"),
    [(2.104, "2.10 s"), (0.0123, "12.3 ms"), (0.9999, "1.00 s"), (8.7e-7, "0.87 µs"), (0, "0 µs")],
)
def test_times(number, words):
    assert seconds(number) == words
