"""`import onerec_hf` registers its classes, in any order of imports, in programs of any name, in threads and in new processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
config = AutoConfig.for_model('onerec', codebook_sizes=[4, 4], hidden_size=16, num_experts=2, encoder_layers=1)
print(type(AutoModel.from_config(config)).__name__, type(AutoModelForSeq2SeqLM.from_config(config)).__name__)
from transformers.pipelines import PIPELINE_REGISTRY
assert 'generative-recommendation' in PIPELINE_REGISTRY.supported_tasks
"""
AUTO = "from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM\n"


def python(*command, **kwargs):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, **kwargs)


ORDERS = {
    "ours first": "import onerec_hf\n" + AUTO,
    "Auto classes first": AUTO + "import onerec_hf\n",
    "transformers first": "import transformers, onerec_hf\n" + AUTO,
    "our model first": "from onerec_hf import OneRecForConditionalGeneration\n" + AUTO,
    "the pipeline first": "import onerec_hf\nfrom transformers import pipeline\n" + AUTO,
    "a library that imports transformers": "import onerec_hf, trl.trainer.dpo_trainer\n" + AUTO,
}


@pytest.mark.parametrize(
    "order", [pytest.param(name, marks=[pytest.mark.slow] * (place > 1)) for place, name in enumerate(ORDERS)]
)
def test_any_order_of_imports(order):
    done = python("-c", ORDERS[order] + CHECK)
    assert done.stdout.split() == ["OneRecModel", "OneRecForConditionalGeneration"], done.stderr
    assert done.stderr == ""


def test_a_program_with_our_name(tmp_path):
    program = tmp_path / "onerec-hf"
    program.write_text("import onerec_hf\n" + AUTO + CHECK)
    done = python(program)
    assert done.stdout.split() == ["OneRecModel", "OneRecForConditionalGeneration"], done.stderr


@pytest.mark.slow
def test_threads_and_spawned_workers(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import concurrent.futures, multiprocessing\n"
        "import transformers\n"  # threads that import it all at once fail without us, too
        "def name(_):\n"
        "    import onerec_hf\n"
        "    from transformers import AutoConfig\n"
        "    return type(AutoConfig.for_model('onerec')).__name__\n"
        "if __name__ == '__main__':\n"
        "    with concurrent.futures.ThreadPoolExecutor(4) as pool: print(*pool.map(name, range(4)))\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool: print(*pool.map(name, range(1)))\n"
    )
    done = python(program)
    assert done.stdout.split() == ["OneRecConfig"] * 5, done.stderr


def test_import_alone_is_quick_and_leaves_imports_as_they_were():
    code = (
        "import sys, json; import onerec_hf\n"
        "heavy = sorted({'torch', 'transformers', 'numpy'} & set(sys.modules))\n"
        "from transformers import AutoConfig\n"
        "spec = sys.modules['transformers.configuration_utils'].__spec__\n"
        "print(json.dumps([heavy, [str(f) for f in sys.meta_path if type(f).__module__.startswith('onerec_hf')], type(spec.loader).__name__]))"
    )
    done = python("-c", code)
    assert json.loads(done.stdout) == [[], [], "SourceFileLoader"], done.stderr


def test_the_package_runs_as_a_program():
    done = python("-m", "onerec_hf", "--version")
    from onerec_hf import __version__

    assert done.stdout == f"onerec-hf {__version__}\n", done.stderr
    assert "runpy" not in done.stderr
