"""The discrete-event model against closed forms, and against a slow event queue."""

import heapq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark_scripts import import_script

model = import_script("forecast")
Link, StageCost, forecast = model.Link, model.StageCost, model.forecast
WHOLE = st.integers(0, 9)


@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("batches", [1, 7])
def test_equal_stages_without_overlap(stages, batches):
    result = forecast([StageCost(2.0, 0.0)] * stages, batches)
    assert result.seconds == 2 * (batches + stages - 1)
    assert result.bubble == pytest.approx((stages - 1) / (batches + stages - 1))


def test_only_the_forward_delays_the_next_stage():
    """φ = F / (F + rest): the fill advances after the forward only."""
    result = forecast([StageCost(1.0, 3.0)] * 4, 10)
    assert result.seconds == 10 * 4 + 3 * 1


def test_the_most_expensive_stage_sets_the_pace():
    costs = [StageCost(1.0, 1.0), StageCost(2.0, 3.0), StageCost(1.0, 0.0)]
    assert forecast(costs, 101).seconds - forecast(costs, 1).seconds == 100 * 5


def test_a_slow_link_sets_the_pace():
    result = forecast([StageCost(1.0, 1.0, payload=30.0)] * 2, 50, Link(bandwidth=10.0, latency=0.5))
    assert result.spans[1][0][0] == 1 + 3 + 0.5
    assert result.spans[1][-1][0] - result.spans[1][10][0] == pytest.approx(3 * 39)


def test_a_stage_runs_ahead_only_as_far_as_the_link_is_deep():
    slow = [StageCost(1.0, 0.0), StageCost(10.0, 0.0)]
    ahead = forecast(slow, 30, Link(depth=3)).spans
    assert all(ahead[0][k][1] >= ahead[1][k - 3][0] for k in range(3, 30))
    assert forecast(slow, 30, Link(depth=3)).seconds == forecast(slow, 30, Link(depth=30)).seconds


def slowly(costs: list[tuple[int, int, int]], batches: int, latency: int) -> float:
    """An event queue, for links that are never full."""
    arrived = [set(range(batches))] + [set() for _ in costs[1:]]
    done, busy, wire, end = [0] * len(costs), [False] * len(costs), [0.0] * len(costs), 0.0
    events: list[tuple[float, int, str, int]] = [(0.0, i, "look", 0) for i in range(len(costs))]
    while events:
        now, i, what, batch = heapq.heappop(events)
        forward, rest, travel = costs[i]
        if what == "arrive":
            arrived[i].add(batch)
        elif what == "send":
            wire[i] = max(now, wire[i]) + travel
            heapq.heappush(events, (wire[i] + latency, i + 1, "arrive", batch))
        elif what == "done":
            busy[i], end = False, max(end, now)
            done[i] += 1
        if not busy[i] and done[i] < batches and done[i] in arrived[i]:
            busy[i] = True
            if i + 1 < len(costs):
                heapq.heappush(events, (now + forward, i, "send", done[i]))
            heapq.heappush(events, (now + forward + rest, i, "done", done[i]))
    return end


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(WHOLE, WHOLE, WHOLE), min_size=1, max_size=5),
    st.integers(1, 8),
    st.integers(0, 3),
)
def test_against_an_event_queue(costs, batches, latency):
    stages = [StageCost(forward, rest, payload) for forward, rest, payload in costs]
    result = forecast(stages, batches, Link(bandwidth=1.0, latency=latency, depth=100))
    assert result.seconds == pytest.approx(slowly(costs, batches, latency))
