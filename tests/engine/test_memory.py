"""Peak memory of a graph, counted by hand."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fasttrace.engine.graph.capture import make_graph
from fasttrace.engine.memory import peak_bytes


def graph_of(function, *inputs):
    module = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs)
    names = tuple(f"x{i}" for i in range(len(inputs)))
    return make_graph(module.graph, names, ("y",))


def test_a_chain_holds_two_at_a_time():
    graph = graph_of(lambda x: (((x + 1) * 2) - 3,), torch.zeros(100))
    assert peak_bytes(graph) == 2 * 400


def test_what_is_read_later_is_held():
    def function(x):
        a = x + 1
        b = a * 2
        c = b * 3
        return (c + a,)

    assert peak_bytes(graph_of(function, torch.zeros(100))) == 3 * 400


def test_views_take_nothing_and_keep_alive():
    def function(x):
        a = x + 1  # alive as long as its view
        b = a.view(10, 10)
        c = x.sum() * 2
        return (b * c,)

    assert peak_bytes(graph_of(function, torch.zeros(100))) == 400 + 400 + 4
