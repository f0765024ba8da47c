from tandem.placement.simulator.event_queue import EventQueue


def test_equal_times_keep_their_order_and_steps_end_last() -> None:
    events, called = EventQueue(), list[tuple[float, str]]()

    def note(name: str) -> None:
        called.append((events.now_s, name))

    events.at_step_end(1.0, note, "step")
    events.at(2.0, note, "later")
    events.at(1.0, note, "first")
    events.at(1.0, note, "second")
    while events.next_s() < float("inf"):
        events.run_next()
    assert called == [(1.0, "first"), (1.0, "second"), (1.0, "step"), (2.0, "later")]
