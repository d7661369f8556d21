"""Host-side planning on numbers small enough to count by hand."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrace.engine.graph.prune import Cost
from fasttrace.engine.work import Setting, batches_of, bound, plan_work, todo_of
from fasttrace.types import Lane, Patch, Selector, Site

A, B, C = (Site(name, "resnet", "unet", i, (1,)) for i, name in enumerate("ABC"))
# A row costs 10, of which 8 depend on the text. C comes last: replacing it saves 6, 2 follow it.
COST = Cost(10, 8, dead={"A": 0, "B": 1, "C": 6}, after={"A": 9, "B": 5, "C": 2})
ORDER = ["A", "B", "C"]


def setting(**changes):
    known = {"calls": 4, "guided": True, "lanes": 8, "cached": frozenset(ORDER)}
    return Setting(**(known | changes))


def lane(site, window=None, **more):
    return Lane((Patch(site, Selector(window=window), **more),))


def test_bound_by_hand():
    own = setting()
    todo = todo_of([[lane(A), lane(C), lane(B, (1, 3))]], own)
    clean_and_corrupt = 2 * 3 * 20 + (10 + 2 + 2 * 8)
    a = 9 + 3 * 20
    c = 2 + 3 * (20 - 6)
    b = 5 + (20 - 1) + 20  # opens at call 1, one more call inside the window, one after it
    assert bound(COST, own, 1, todo) == clean_and_corrupt + a + c + b


def test_bound_without_guidance_and_sharing_by_hand():
    own = setting(guided=False, shared=False)
    todo = todo_of([[lane(C)]], own)
    assert bound(COST, own, 1, todo) == 2 * 3 * 10 + (2 + 2 * 8) + 2 + 3 * (10 - 6)


def test_work_by_hand():
    """One pair: the trunk, two floor lanes, one shared call, one batch of four lanes."""
    own = setting(pruning=False)
    todo = todo_of([[lane(A), lane(C)]], own)
    work = plan_work(todo, 1, own, COST, ORDER)
    (stairs,) = work.stairs
    assert stairs.joins == {"A": 2, "C": 2}  # a corrupt copy joins with the first and the last
    assert stairs.flops(COST) == 2 * 10 + 2 * 9 + 2 * 2
    (batch,) = work.batches
    assert (batch.start, batch.size, batch.copies, batch.lanes) == (1, 4, True, ((0, 0), (0, 1)))
    assert batch.flops(COST, own) == 4 * 3 * 20
    assert work.useful(COST, todo) == 2 * 4 * 20 + (9 + 3 * 20) + (2 + 3 * 20)


def test_pruned_where_it_pays():
    own = setting()
    many = [[lane(B), lane(C)] for _ in range(6)]
    work = plan_work(todo_of(many, own), 6, own, COST, ORDER)
    assert [b.pruned for b in work.batches if b.pruned] == ["C"]
    (pruned,) = (b for b in work.batches if b.pruned)
    assert pruned.size == 8
    assert pruned.flops(COST, own) == 8 * 3 * (20 - 6)
    few = plan_work(todo_of(many[:3], own), 3, own, COST, ORDER)
    assert not [b for b in few.batches if b.pruned]  # less than half a batch
    led = plan_work(todo_of(many, own), 6, setting(cached=frozenset()), COST, ORDER)
    assert not [b for b in led.batches if b.pruned]  # nothing recorded to read


lanes = st.builds(
    lane,
    st.sampled_from([A, B, C]),
    st.sampled_from([None, (0, 1), (1, 3), (3, 4)]),
    strength=st.sampled_from([1.0, 0.5]),
    source=st.sampled_from(["clean", "corrupt", "text:clean"]),
)


@settings(deadline=None)
@given(
    pairs=st.lists(st.lists(lanes, max_size=20, unique=True), min_size=1, max_size=6),
    most=st.integers(4, 12),
    cached=st.sets(st.sampled_from(ORDER)),
    shared=st.booleans(),
    own_texts=st.booleans(),
)
def test_every_lane_runs_once_and_every_shape_has_copies(pairs, most, cached, shared, own_texts):
    own = setting(lanes=most, cached=frozenset(cached), shared=shared, own_texts=own_texts)
    todo = todo_of(pairs, own)
    work = plan_work(todo, len(pairs), own, COST, ORDER)
    climbed = [(s.pair, i) for s in work.stairs for i in s.whole]
    climbed += [(s.pair, i) for s in work.stairs for _, group in s.joining for i in group]
    assert len(set(climbed)) == len(climbed)
    opening = {t.key: t.opening for t in todo}
    run = [key for batch in work.batches for key in batch.lanes]
    assert len(set(run)) == len(run)
    over = {key for key in climbed if opening[key] + 1 == own.calls}
    assert set(run) | over == set(opening)
    shapes = set()
    for batch in work.batches:
        shape = (batch.start, batch.size, batch.pruned, batch.window)
        assert batch.copies or shape in shapes
        shapes.add(shape)
        assert len(batch.leaders) + len(batch.lanes) + 2 * batch.copies <= batch.size
        assert batch.size <= max(most, 4) or len(batch.leaders) + 3 > most
        for key in batch.lanes:
            assert batch.start == opening[key] + (key in climbed)
    assert work.useful(COST, todo) >= bound(COST, own, len(pairs), todo)
    assert batches_of(todo, climbed, own, COST) == list(work.batches)
