"""Many runs: a grid is composed once for each choice of files, and thousands of records are a report."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, TESTS, environment
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf, open_dict
from synthetic import NORMS, write_run

from gnbench.configs import CONFIGS
from hydra_plugins.gnbench.composer import Composer


@pytest.fixture
def context():
    """Hydra's, as a sweep on the tiny data set has it."""
    import gnbench.cli  # noqa: F401  registers the schema

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        words = [f"hydra.searchpath=[file://{TESTS}/configs]", "data=tiny", "model=resnet8"]
        config = loader.load_configuration("config", words, RunMode.MULTIRUN)
        yield HydraContext(config_loader=loader, callbacks=Callbacks()), config


def compose_by_hydra(context, overrides: list[str]):
    hydra_context, config = context
    cfg = hydra_context.config_loader.load_sweep_config(config, overrides)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


@pytest.mark.parametrize(
    "words",
    [
        "norm=bn batch_size=4 seed=3",
        "seed=3 batch_size=4 norm=bn norm_batch_size=2",
        "norm=gn norm.num_groups=4",
        "norm=gn norm.channels_per_group=2 norm.num_groups=null",
        "norm=brn norm.r_max=3 norm_batch_size=${base_batch_size}",
        "model=resnet20 data=tiny data.train_size=12 data.augment=none",
        "milestones=[0.2,0.3] schedule=step epochs=3",
        "results='a directory/with words' base_lr=1e-3 precision=bf16",
        "sweep=batch_size norm=ln",
        "norm=in tuned_from=results/tune",
        "norm={eps:0.1}",
        "+norm.more=1",
        "++batch_size=4 batch_size=8",
        "norm=gn ~norm.eps",
        "results=${hydra:job.override_dirname} seed=1",
        "deterministic=true checkpoint_s=5",
    ],
)
def test_a_cell_is_composed_as_by_hydra(context, words):
    overrides = words.replace("a directory/with words", "a_directory").split()
    composer = Composer(*context)
    for _ in range(2):  # the second time from what is kept
        ours, hydras = composer.compose(overrides), compose_by_hydra(context, overrides)
        assert OmegaConf.to_yaml(ours) == OmegaConf.to_yaml(hydras)
        assert OmegaConf.to_container(ours, resolve=True) == OmegaConf.to_container(hydras, resolve=True)
        assert OmegaConf.is_struct(ours) == OmegaConf.is_struct(hydras)
        assert list(ours) == list(hydras)


@pytest.mark.parametrize("words", ["batchsize=2", "batch_size=many", "norm=foo", "norm=bn norm.num_groups=4", "a/b=1"])
def test_a_cell_is_refused_as_by_hydra(context, words):
    sentences = []
    for compose in (Composer(*context).compose, lambda overrides: compose_by_hydra(context, overrides)):
        with pytest.raises(HydraException) as error:
            compose(words.split())
        sentences.append((type(error.value), str(error.value)))
    assert sentences[0] == sentences[1]


def test_cells_do_not_see_each_others_values(context):
    composer = Composer(*context)
    first = composer.compose(["norm=bn", "batch_size=4", "norm.eps=0.1"])
    second = composer.compose(["norm=bn", "seed=7"])
    assert (first.batch_size, first.norm.eps, first.seed) == (4, 0.1, 0)
    assert (second.batch_size, second.norm.eps, second.seed) == (128, 1e-5, 7)


def test_a_grid_is_composed_once_for_each_choice_of_files(context, monkeypatch):
    hydra_context, config = context
    loaded, load = [], hydra_context.config_loader.load_sweep_config
    monkeypatch.setattr(
        hydra_context.config_loader, "load_sweep_config", lambda *args: loaded.append(args) or load(*args)
    )
    composer = Composer(hydra_context, config)
    for norm in ("bn", "gn"):
        for seed in range(20):
            assert composer.compose([f"norm={norm}", f"seed={seed}", "batch_size=4"]).norm.name == norm
    assert len(loaded) == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the report's own peak in /proc, not one inherited")
def test_two_thousand_runs_are_a_report_of_less_than_a_gigabyte(tmp_path):
    for norm in NORMS:
        for batch_size in (32, 16, 8, 4, 2):
            for seed in range(100):
                write_run(tmp_path / "sweep", norm, batch_size, seed, num_epochs=30)
    code = (
        "import sys; from gnbench.analysis.report import main; assert main(sys.argv[1:]) == 0;"
        "print(open('/proc/self/status').read())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "sweep")]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    peak_kib = int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout).group(1))
    assert peak_kib < 2**20
