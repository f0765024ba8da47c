from tandem.placement.simulator.agenda import Agenda


def test_equal_times_keep_their_order_and_steps_end_last() -> None:
    agenda, called = Agenda(), list[tuple[float, str]]()

    def note(name: str) -> None:
        called.append((agenda.now_s, name))

    agenda.at_step_end(1.0, note, "step")
    agenda.at(2.0, note, "later")
    agenda.at(1.0, note, "first")
    agenda.at(1.0, note, "second")
    while agenda.next_s() < float("inf"):
        agenda.run_next()
    assert called == [(1.0, "first"), (1.0, "second"), (1.0, "step"), (2.0, "later")]
