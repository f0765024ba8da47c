"""Reads `coverage json` on stdin; prints the covered lines of each package and of all, in percent."""

import json
import sys
from collections import Counter

lines: Counter[str] = Counter()
covered: Counter[str] = Counter()
for path, file in json.load(sys.stdin)["files"].items():
    for package in (path.split("/")[0], "total"):
        lines[package] += file["summary"]["num_statements"]
        covered[package] += file["summary"]["covered_lines"]
for package in [*sorted(set(lines) - {"total"}), "total"]:
    print(
        f"{package:16}{covered[package]:6} of {lines[package]:6} lines {100 * covered[package] / lines[package]:6.1f} %"
    )
