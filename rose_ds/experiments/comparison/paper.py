"""What ROSE's paper reports (Jiang et al., EMNLP 2022, Tables 1 to 3)."""

from __future__ import annotations

TASKS = ("sst2", "rte", "qnli", "qqp")

#: By model and method: accuracy on GLUE's and on AdvGLUE's dev set for each of TASKS, in percent; means over its runs.
TABLE_1: dict[tuple[str, str], tuple[tuple[float, float], ...]] = {
    ("roberta-base", "vanilla"): ((94.29, 24.05), (77.91, 28.15), (92.97, 27.43), (91.58, 19.49)),
    ("roberta-base", "r-drop"): ((95.32, 27.84), (79.86, 31.36), (93.30, 28.92), (91.86, 37.44)),
    ("roberta-base", "child-tuning"): ((94.21, 23.82), (75.52, 16.54), (92.36, 31.89), (91.64, 17.95)),
    ("roberta-base", "smart"): ((94.98, 35.95), (77.54, 24.44), (93.35, 34.29), (91.04, 46.58)),
    ("roberta-base", "freelb"): ((94.89, 35.81), (78.42, 32.10), (93.12, 36.22), (92.04, 44.10)),
    ("roberta-base", "rose-first"): ((94.84, 37.67), (78.34, 35.49), (92.19, 44.19), (89.56, 44.44)),
    ("roberta-base", "rose-second"): ((93.78, 36.99), (78.16, 37.97), (92.41, 34.63), (90.48, 45.73)),
    ("roberta-base", "rose-ensemble"): ((94.09, 39.36), (78.63, 38.02), (92.64, 39.59), (90.39, 47.44)),
    ("roberta-large", "vanilla"): ((96.08, 56.08), (85.92, 61.73), (94.58, 63.38), (92.09, 40.60)),
    ("roberta-large", "r-drop"): ((96.59, 53.38), (85.56, 66.67), (95.01, 55.95), (92.35, 44.80)),
    ("roberta-large", "child-tuning"): ((95.91, 51.35), (85.92, 61.73), (94.30, 58.11), (92.03, 43.59)),
    ("roberta-large", "smart"): ((96.67, 59.12), (85.02, 69.14), (94.91, 61.04), (92.12, 50.85)),
    ("roberta-large", "freelb"): ((96.49, 59.32), (86.76, 66.91), (94.99, 62.30), (92.60, 48.21)),
    ("roberta-large", "rose-first"): ((95.58, 57.77), (85.13, 70.62), (94.08, 64.02), (90.67, 60.26)),
    ("roberta-large", "rose-second"): ((96.29, 60.59), (85.08, 67.49), (94.72, 63.68), (91.68, 55.90)),
    ("roberta-large", "rose-ensemble"): ((96.10, 60.81), (85.92, 71.11), (94.26, 64.64), (91.46, 60.51)),
}

#: By model and method: Avg and Delta over TASKS, GLUE and AdvGLUE, in points.
TABLE_2: dict[tuple[str, str], tuple[float, float]] = {
    ("roberta-base", "r-drop"): (60.74, 58.70),
    ("roberta-base", "r-drop+rose-first"): (63.41, 51.51),
    ("roberta-base", "r-drop+rose-second"): (61.45, 53.87),
    ("roberta-base", "r-drop+rose-ensemble"): (63.58, 49.64),
    ("roberta-large", "r-drop"): (73.79, 37.18),
    ("roberta-large", "r-drop+rose-first"): (75.39, 33.58),
    ("roberta-large", "r-drop+rose-second"): (74.91, 34.74),
    ("roberta-large", "r-drop+rose-ensemble"): (75.92, 32.66),
}

#: By model: Avg of ROSE-Ensemble by gamma.
TABLE_3: dict[str, dict[float, float]] = {
    "roberta-base": {0.1: 59.35, 0.3: 58.42, 0.5: 65.02, 0.7: 61.09, 0.9: 59.88},
    "roberta-large": {0.1: 75.07, 0.3: 75.51, 0.5: 78.10, 0.7: 75.60, 0.9: 73.22},
}


def table_1(model: str, method: str) -> dict[str, tuple[float, float]]:
    """GLUE and AdvGLUE accuracy by task, in percent; empty where the paper has none.

    Args:
        model: a hub's name, with or without its owner.
    """
    found = TABLE_1.get((_plain(model), method), ())
    return dict(zip(TASKS, found, strict=False))


def table_2(model: str, method: str) -> tuple[float, float] | None:
    """Avg and Delta of R-Drop and of its combinations with ROSE's masks, in points; None where the paper has none."""
    return TABLE_2.get((_plain(model), method))


def table_3(model: str, gamma: float) -> float | None:
    """Avg of ROSE-Ensemble at a gamma, in points; None where the paper has none."""
    return TABLE_3.get(_plain(model), {}).get(gamma)


def _plain(model: str) -> str:
    return model.rsplit("/", 1)[-1]
