"""A page whose sections are written by different scripts."""

from bench.fidelity.page import replace_section


def test_a_section_is_replaced_and_the_others_stay() -> None:
    document = "# Fidelity\n\nText.\n\n## Ours\n\nold\n\n### sub\n\nold too\n\n## vLLM\n\nkept\n"
    changed = replace_section(document, "Ours", "new")
    assert changed == "# Fidelity\n\nText.\n\n## Ours\n\nnew\n\n## vLLM\n\nkept\n"
    assert replace_section(changed, "Ours", "new\n") == changed


def test_an_empty_page_gets_a_head() -> None:
    only = replace_section("", "Ours", "new")
    assert only.startswith("# Fidelity\n")
    assert only.endswith("\n\n## Ours\n\nnew\n")
