from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

if (
    not torch.cuda.is_available()
):  # set before triton is imported, so that its kernels are interpreted on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests whose names begin so share what is slow to make (a server, a site, trained runs), and run in
# one process when pytest-xdist divides the suite. They come before all others, the longest first,
# so that the processes end at about the same time.
TOGETHER = (
    "tests/core/test_triton_compiled.py",
    "tests/apps/test_compare.py",
    "tests/apps/test_demo_page.py",
    "tests/interop/test_parallel.py",
    "tests/apps/test_strategies.py",
    "tests/apps/test_bench_gpu.py",
    "tests/apps/test_recipes.py",
    "tests/apps/test_demo_guard.py",
    "tests/test_docs.py::test_the_code_of_a_page_runs_from_the_command_line",
    "tests/interop/test_timm_door.py",
    "tests/test_project.py",
    "tests/interop/test_export_trained.py",
    "tests/test_docs.py::test_the_site",
    "tests/apps/test_first_run.py",
    "tests/apps/test_segmentation.py",
    "tests/apps/test_detection.py",
)


# `make test-fast` leaves out tests whose names contain one of these: tests that compile, interpret
# Triton's kernels, train for more than a few steps, or start servers and other processes
SLOW = (
    "compile",
    "triton",
    "apps/test_bench.py::test_against_compares_equal_rows_alone",
    "apps/test_bench.py::test_dense_that_does_not_fit",
    "apps/test_bench.py::test_two_dtypes_and_another_backend",
    "apps/test_bench_gpu.py",
    "apps/test_broken_inputs.py::test_in_processes",
    "apps/test_compare.py::test_another_seed",
    "apps/test_compare.py::test_command_line_end_to_end",
    "apps/test_compare.py::test_ctrl_c",
    "apps/test_compare.py::test_few_packages_are_enough",
    "apps/test_compare.py::test_repeating",
    "apps/test_compare.py::test_several_runs_at_a_time",
    "apps/test_demo_guard.py",
    "apps/test_demo_page.py",
    "apps/test_experiments.py::test_from_the_command_line",
    "apps/test_experiments.py::test_processes_end",
    "apps/test_experiments.py::test_what_processes_are_forked_from",
    "apps/test_imports.py::test_an_experiment",
    "apps/test_imports.py::test_commands_with",
    "apps/test_imports.py::test_compare_and_lists",
    "apps/test_bench.py::test_buckets",
    "apps/test_recipes.py::test_a_checkpoint_of_an_earlier_version",
    "apps/test_recipes.py::test_a_recipe_for_imagenet",
    "apps/test_recipes.py::test_digits_of_another_size",
    "apps/test_recipes.py::test_my",
    "core/test_swin_pvt.py::test_blocks_recompute",
    "interop/test_export_converted.py",
    "interop/test_transformers_tools.py::test_a_trainer",
    "apps/test_first_run.py::test_a_warning_names",
    "apps/test_first_run.py::test_ctrl_c",
    "apps/test_first_run.py::test_the_bar_fits",
    "apps/test_images.py::test_digits_move_by_whole_steps",
    "apps/test_images.py::test_workers_give_the_same",
    "apps/test_recipes.py::test_evaluate",
    "apps/test_recipes.py::test_predict",
    "apps/test_recipes.py::test_tiny",
    "apps/test_shards.py::test_interrupted",
    "apps/test_shards.py::test_killed",
    "apps/test_strategies.py",
    "apps/test_text.py::test_several_processes",
    "apps/test_training.py",
    "core/test_functional.py::test_gradcheck",
    "core/test_models.py::test_checkpointing",
    "core/test_modules.py::test_export",
    "interop/test_convert.py::test_timm",
    "interop/test_convert_grids.py::test_copies_and_whole_programs",
    "interop/test_export.py",
    "interop/test_export_trained.py",
    "interop/test_parallel.py",
    "interop/test_timm_door.py",
    "test_docs.py::test_the_code_of_a_page_runs",
    "test_project.py::test_old_import_paths_work",
    "test_docs.py::test_the_site",
)
# except these, so that it reaches every module
FAST = (
    "apps/test_training.py::test_a_run_leaves_what_it_should",
    "core/test_functional.py::test_mix_is_the_oracles[triton",
    "core/test_modules.py::test_compile_in_one_graph[False-window]",
    "core/test_neighborhood.py::test_large_scores_do_not_overflow[triton]",
    "core/test_triton.py::test_batches[3-",
    "interop/test_export.py::test_examples",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        name = item.nodeid
        if any(part in name for part in SLOW) and not any(part in name for part in FAST):
            item.add_marker(pytest.mark.slow)
    names = {name: place for place, name in enumerate(TOGETHER)}
    items.sort(key=lambda item: names.get(together(item.nodeid), len(names)))


def together(name):
    """Return the entry of TOGETHER that a test belongs to, or the test's own name."""
    return next((begin for begin in TOGETHER if name.startswith(begin)), name)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    # the marks of `--dist loadgroup` do nothing with pytest 9.2 and pytest-xdist 3.8
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return together(nodeid)

    config.option.loadscopereorder = False  # keeps the order of the items
    return Together(config, log)


settings.register_profile("here", deadline=None, max_examples=20, print_blob=True)
settings.load_profile("here")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The suite runs in parallel processes. With one thread each they do not share cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    # A test may have started more threads, and a fork of a process with several can hang.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    # A process group that a test joined has threads, too.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _poison():
    """Fill new memory with NaN, so that a test notices numbers that were not written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def own_names():
    """Forgets the mixers, models and files of a test's own after it, or when it is called."""
    import sys

    from translution.models import mixers, registry
    from translution.utils.words import MIXER_TITLES

    places = mixers._OWN, registry._MODELS, registry._FAMILIES, MIXER_TITLES
    known = [(names, dict(names)) for names in places]

    def forget():
        for names, before in known:
            names.clear()
            names.update(before)
        for module in [name for name in sys.modules if name.startswith("translution_import_")]:
            del sys.modules[module]

    yield forget
    forget()
