"""The tables of docs/sampling.md come out of results."""

from bench.sampling_table import markdown


def row(provider, T, seconds, *, dense=0.006):
    ratio = dense / seconds
    details = {"rows_share": 0.021, "error": 0.449, "most_speedup": 12.4, "table_bytes": 94e6}
    return {
        "point": {"T": T}, "provider": provider, "label": f"the {provider}", "status": "timed",
        "seconds": {"median": seconds}, "details": {} if provider == "dense" else details,
        "ratios": {"dense": {"median": ratio, "p20": ratio - 0.5, "p80": ratio + 0.5}},
    }  # fmt: skip


def test_one_length_is_told_with_its_spread():
    missing = {"provider": "absent", "point": {"T": 98304}, "status": "missing"}
    rows = [row("dense", 98304, 0.006), row("own", 98304, 0.001), missing]
    assert markdown({"rows": rows}).splitlines() == [
        "dense, 98304 tokens: 6 ms",
        "",
        "| | rows | error | times dense | byte bound | tables |",
        "| --- | --- | --- | --- | --- | --- |",
        "| the own | 2.1% | 0.45 | 6.0 (5.5 to 6.5) | 12 | 94 MB |",
    ]


def test_several_lengths_are_told_beside_their_bounds():
    rows = [
        row("dense", 8192, 0.0003), row("own", 8192, 0.0003, dense=0.0003),
        row("dense", 98304, 0.006), row("own", 98304, 0.001),
        row("dense", 131072, 0.008), row("own", 131072, 0.0005, dense=0.008),
    ]  # fmt: skip
    assert markdown({"rows": rows}).splitlines() == [
        "dense, 8192, 98304, 131072 tokens: 0.3, 6, 8 ms",
        "",
        "| | rows, 98304 | error | 8192 | 98304 | 131072 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| the own | 2.1% | 0.45 | 1.0 (12) | 6.0 (12) | 16 (12) |",
    ]
