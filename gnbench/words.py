"""Words for runs: what tells them apart, what came of one, and numbers with their nouns."""

from collections.abc import Sequence

from gnbench.record import NOT_IDENTITY, leaves

NOT_TOLD = ("seed", "norm_batch_size", "num_threads", *NOT_IDENTITY)  # of a config, in a run's name


def describe(record: dict, varied: str = "") -> str:
    """A finished run in one line; `varied` is what else its sweep varies."""
    config, result, cost = record["config"], record["result"], record.get("cost")
    name = name_run(config, varied)
    if cost is not None:
        return (
            f"{name} {cost['norm_format']} {config['precision']}: {cost['step_ms']:.2f} ms a step, "
            f"{cost['step_ratio']:.2f} of BN's; {cost['inference_ms']:.2f} ms of inference, "
            f"{cost['inference_ratio']:.2f} of BN's"
        )
    if result is None:
        return f"{name}: {record['status']}" + (f", {record['cause']}" if record.get("cause") else "")
    return (
        f"{name}: test error {result['test_error']:.2f} %, training error {result['train_error']:.2f} % "
        f"in {result['time_s']:.0f} s"
    )


def name_run(config: dict, varied: str = "") -> str:
    """A run in a line about it; `varied` is what else its sweep varies."""
    words = [f"{config['norm']['name']} batch_size={config['batch_size']}", varied, f"seed={config['seed']}"]
    return " ".join(filter(None, words))


def name_cells(configs: Sequence[dict]) -> list[str]:
    """What tells runs apart but for their seeds, as "gn bs8 num_groups=2": keys that do not vary are not told."""
    split = {_name_norm(config) for config in configs if config.get("norm_batch_size") not in (None, _size(config))}
    names = [_name_cell(config, _name_norm(config) in split) for config in configs]
    return [" ".join([name, *words]) for name, words in zip(names, _tell_apart(configs, names), strict=True)]


def name_varied(configs: Sequence[dict]) -> list[str]:
    """What varies among the runs of each norm besides batch_size and seed, as "norm_batch_size=2 num_groups=4"."""
    words = _tell_apart(configs, list(map(_name_norm, configs)), known=["batch_size"], first=["norm_batch_size"])
    return list(map(" ".join, words))


def _name_cell(config: dict, split: bool) -> str:
    shared = f" nbs{config['norm_batch_size']}" if split and config["norm_batch_size"] is not None else ""
    return f"{_name_norm(config)} bs{_size(config)}{shared}"


def _name_norm(config: dict) -> str:
    norm = config.get("norm")
    return str(norm.get("name") if isinstance(norm, dict) else norm)


def _size(config: dict) -> int | None:
    return config.get("batch_size")


def _tell_apart(
    configs: Sequence[dict], names: Sequence[str], known: Sequence[str] = (), first: Sequence[str] = ()
) -> list[list[str]]:
    """The words that tell each config from the others of its name, the keys `first` before all others."""
    flat = [dict(leaves(config)) for config in configs]
    rivals: dict[str, list[dict]] = {}
    for name, config in zip(names, flat, strict=True):
        rivals.setdefault(name, []).append(config)
    kept = {}
    for name, group in rivals.items():
        others = dict.fromkeys(key for config in group for key in config if not _is_told_elsewhere(key))
        kept[name] = distinguish(group, [*first, *others], known)
    return [[_tell(key, config.get(key)) for key in kept[name]] for name, config in zip(names, flat, strict=True)]


def distinguish(rows: Sequence[dict], keys: Sequence[str], known: Sequence[str] = ()) -> list[str]:
    """Those of `keys` that are needed to tell rows apart; one that only repeats what earlier ones say is left out.

    Args:
        known: keys that are told anyway.
    """

    def count(keys: Sequence[str]) -> int:
        return len({repr([row.get(key) for key in keys]) for row in rows})

    kept = list(known)
    for key in keys:
        if count([*kept, key]) > count(kept):
            kept.append(key)
    return kept[len(known) :]


def _is_told_elsewhere(key: str) -> bool:
    return key.split(".")[0] in NOT_TOLD or key.rpartition(".")[2] == "norm_batch_size"


def _tell(key: str, value: object) -> str:
    last = key.rpartition(".")[2]
    return str(value) if last == "name" else f"{last}={as_typed(value)}"


def as_typed(value: object) -> str:
    """A config value as the command line has it: true and false, not True and False."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def name_seeds(seeds: Sequence[int | None]) -> str:
    """s0-4 for five in a row, s0,2,7 for others."""
    seeds = sorted(seed for seed in seeds if isinstance(seed, int))
    in_a_row = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"s{seeds[0]}-{seeds[-1]}" if in_a_row else f"s{','.join(map(str, seeds))}"


def has_value(value: object) -> bool:
    """Whether there is something to tell: neither None, nor NaN or pandas' NA, nor an empty text."""
    return value is not None and str(value) not in ("nan", "<NA>", "")


def number_of(number: int | str, noun: str) -> str:
    """A number of things: 1 run, 2 runs, 1 to 3 runs, 2 processes."""
    return f"{number} {noun}" + ("" if str(number) == "1" else "es" if noun.endswith("s") else "s")


def duration(seconds: float) -> str:
    """Seconds below 90, minutes below 90, hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
