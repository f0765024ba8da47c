from tandem.deploy.line_feed import LineFeed


async def test_a_follower_gets_what_it_asks_for_and_all_later_lines() -> None:
    shown = list[str]()
    feed = LineFeed(shown.append)
    for number in range(3):
        feed.say(f"line {number}")
    all_lines, last, new = (feed.follow(num_past) for num_past in (100, 1, 0))
    feed.say("line 3")
    assert shown == ["line 0", "line 1", "line 2", "line 3"]
    assert [await anext(all_lines) for _ in range(4)] == shown
    assert [await anext(last) for _ in range(2)] == shown[2:]
    assert await anext(new) == "line 3"
    for lines in (all_lines, last, new):
        await lines.aclose()  # type: ignore[attr-defined]


async def test_a_follower_that_does_not_read_takes_no_memory() -> None:
    feed = LineFeed(lambda line: None)
    lines = feed.follow(0)
    for number in range(5000):
        feed.say(str(number))
    assert [await anext(lines) for _ in range(1000)] == [str(number) for number in range(1000)]
