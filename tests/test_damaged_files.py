"""Files that fuzzing broke a parser with, one for each thing that was mended."""

import base64
import itertools
import json
import resource
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save, save_file

from onerec_hf import (
    ItemCatalogue,
    OneRecConfig,
    OneRecForConditionalGeneration,
    OneRecProcessor,
    OneRecRewardConfig,
    RewardItems,
)
from onerec_hf.cli.arguments import parse
from onerec_hf.cli.plan import recipe_options
from onerec_hf.cli.recommend import RecommendArguments, naming_file, read_file, resolve_line
from onerec_hf.data import read_interactions, read_items
from onerec_hf.data.interactions import check_embeddings
from onerec_hf.modeling.files import map_npy
from onerec_hf.modeling.hub import check_weights
from onerec_hf.modeling.requests import Recommender
from onerec_hf.semantic_ids import ResidualQuantizer, fit_semantic_ids, read_grid_tensor, read_index_json
from onerec_hf.semantic_ids.quantizer import Quantizer
from onerec_hf.semantic_ids.report import SemanticIDReport
from onerec_hf.workflows.artefact import load_model, load_processor
from onerec_hf.workflows.preferences import read_preferences
from onerec_hf.workflows.settings import DataSettings, SemanticIDSettings
from tests.conftest import make_model

ROW = {"user_id": "u1", "item_id": "m1", "timestamp": 1}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


# Tables


@pytest.mark.parametrize("bad", ["null", "[1]", "7", '{"user_id": {}}'])
def test_json_lines_that_are_no_rows(tmp_path, bad):
    with pytest.raises(ValueError, match=r"clicks\.jsonl"):
        read_interactions(lines(tmp_path / "clicks.jsonl", ROW, bad))


def test_lists_among_integers_in_a_column(tmp_path):
    path = lines(tmp_path / "clicks.jsonl", {**ROW, "user_id": 1}, {**ROW, "user_id": [2]})
    with pytest.raises(ValueError, match=r"clicks\.jsonl: column 'user_id': ids of mixed types"):
        read_interactions(path)
    assert len(read_interactions(lines(path, {**ROW, "seen": 1}, {**ROW, "seen": [2]}))) == 2


def test_a_list_among_the_lines(tmp_path):
    path = lines(tmp_path / "clicks.jsonl", ROW, [[7, [1]]])
    with pytest.raises(ValueError, match=r"clicks\.jsonl: cannot be read as jsonl: line 2 is not a JSON object"):
        read_interactions(path)


def test_a_frame_whose_columns_are_numbers():
    table = pd.DataFrame({**{name: [value, value] for name, value in ROW.items()}, 7: [[1], [1]]})
    with pytest.warns(UserWarning, match="dropped 1 of 2 rows"):
        assert read_interactions(table)[7].tolist() == [[1]]


def test_errors_say_which_of_two_tables(tmp_path):
    path = lines(tmp_path / "products.jsonl", {"item_id": "m1"}, {"item_id": None})
    with pytest.raises(ValueError, match=r"products\.jsonl: column 'item_id': 1 of 2 ids are null"):
        read_items(path)


@pytest.mark.parametrize(
    ("name", "header"),
    [("a.tsv", "user_id\titem_id\ttimestamp"), ("a.inter", "user_id:token\titem_id:token\ttimestamp:float")],
)
def test_a_timestamp_of_more_digits_than_a_float_holds(tmp_path, name, header):
    path = tmp_path / name
    path.write_text(f"{header}\nu1\tm1\t1{'0' * 400}\n")
    with pytest.raises(ValueError, match=rf"{name}: .*timestamp"):
        read_interactions(path)


@pytest.mark.parametrize("name", ["clicks.csv", "clicks.inter"])
def test_a_row_of_separators_is_no_header(tmp_path, name):
    path = tmp_path / name
    separator = "," if name.endswith("csv") else "\t"
    path.write_text(separator.join(f"c{i}:token" for i in range(9_000)) + "\n" + separator * 8_999)
    with pytest.raises(ValueError, match="9,000 columns"):
        read_interactions(path)


def test_long_values_do_not_make_long_messages(tmp_path):
    path = tmp_path / "clicks.csv"
    path.write_text(f"{'x' * 50_000},item_id\n1,2\n")
    with pytest.raises(ValueError, match="no column") as refusal:
        read_interactions(path)
    assert len(str(refusal.value)) < 2_000


def test_a_parquet_file_that_unfolds(tmp_path):
    path = tmp_path / "clicks.parquet"
    text = pa.DictionaryArray.from_arrays(np.zeros(60_000, dtype=np.int32), ["x" * 1_000_000])
    pq.write_table(pa.table({"item_id": text}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1_000
    before = peak_mib()
    with pytest.raises(ValueError, match="decode to 60,000,000,000 bytes"):
        read_interactions(path)
    assert peak_mib() - before < 200


# A small table of items whose second column says of itself what cannot be. Asked for that column's metadata, pyarrow 26 ends the process.
COLUMN_THAT_LIES = (
    "c-jka3^EjD5S`M%A$o>UN0bT3W)o$TF=GG%`ECvn#lXb;_8=o8g8|2Z1({io|2sCUEz7cEpbY$wt6ch_kBfnk0cfL&s0Xsu8XQ5XDGE7>"
    "xdjq%mY^VtgOZaH5)zW0Fidh>smW#8xs#RQ^7e%_LO?m7DKerq2;(F;pcdLASYkjcFh#Lik;2d{|BYdeeS{|;#Bh3t6x^>Yll&}~u7r5@"
    "|B2aOgkhew!t^YI1A>L{EV3we&o(fyGqhN=hYpZmQB#GQs257A;0#MFPSsJ!&q<L$FtMi#mPv`7M^{>L{j}6%xNXV*Kp0QL;BY{&5MhNZ"
    "iX&k#^RYAZY>Jx;4lEW)A5#Viw&LWB)Z9c-HU?21RVE4c%#zgH_{<bl1|J!aB9ItsNoGk-Dolh6BvMe6nViZX#wKYaX`{v<Bg!MG%EllG"
    "*DcB-#w2#6fkW&MqZ)?|Fb*VTL_xk`Vz3cwXyA}!lT>410vd*-6=DfkW0lxEMzt0u8=Tn+$ut2;Hzc#Tpk{%c2R3UKqu4G+wMEP}BxNdu"
    "1)4CYirr}95Mxr~5WB*{K+w;3SV;DC1EbgyMztGkAYXGj<&>sEyp3R@`dbLaIIRBO!Kn6!-G-$6h0Wjh!2Z6&B6foak8j~5)8iYsZSdq5"
    "(mW1~@GCqvBxM%d9^b+#c8i5UL!ltCsIWA(L^rvhKsT|dD8F2xEVZaOGe1wk$V|^b&rs3^m^&bdA)1+iAplrQ0RRQH1wj"
)


def test_a_parquet_file_whose_column_lies(tmp_path):
    path = tmp_path / "items.parquet"
    path.write_bytes(zlib.decompress(base64.b85decode(COLUMN_THAT_LIES)))
    code = "import sys; from onerec_hf.data import read_items; read_items(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "items.parquet" in done.stderr.splitlines()[-1]
    assert "histogram size mismatch" in done.stderr.splitlines()[-1]


def test_a_parquet_file_whose_texts_are_none(tmp_path):
    path = tmp_path / "items.parquet"
    texts = pa.array([b"fine", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"item_id": ["m1", "m2"], "title": texts}), path)
    with pytest.raises(ValueError, match=r"items\.parquet"):
        read_items(path)


def test_a_parquet_file_of_a_hundred_million_equal_values(tmp_path):
    path = tmp_path / "clicks.parquet"
    chunk = pa.table({"user_id": np.zeros(10**6, dtype=np.int8)})
    with pq.ParquetWriter(path, chunk.schema) as writer:
        for _ in range(100):
            writer.write_table(chunk)
    with pytest.raises(ValueError, match="decode to 100,000,000 values"):
        read_interactions(path)


# Arrays


def npy(header: str, version: bytes = b"\1\0", length: int | None = None) -> bytes:
    size = len(header) if length is None else length
    return b"\x93NUMPY" + version + size.to_bytes(2 if version[0] == 1 else 4, "little") + header.encode()


@pytest.mark.parametrize(
    "content",
    [
        npy("-" * 5_000 + "1"),  # too deep for the parser
        npy("{'descr': '<f4', 9" + "9" * 2_000),
        npy("{[]: 1}"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"),
        npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**12}, 4)}}"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, -1)}"),
    ],
)
def test_headers_of_arrays(tmp_path, content):
    (tmp_path / "vectors.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"vectors\.npy"):
        map_npy(tmp_path / "vectors.npy")


def test_a_header_of_four_gigabytes(tmp_path):
    (tmp_path / "vectors.npy").write_bytes(npy("{}", b"\2\0", 2**32 - 1))
    before = peak_mib()
    with pytest.raises(ValueError, match="longer than the file"):
        map_npy(tmp_path / "vectors.npy")
    assert peak_mib() - before < 100


def test_embeddings_without_dimensions(tmp_path):
    np.save(tmp_path / "vectors.npy", np.zeros((3, 0), dtype=np.float32))
    with pytest.raises(ValueError, match=r"vectors\.npy: expected an \(items, d\) array"):
        check_embeddings(tmp_path / "vectors.npy", np.arange(3))


# Semantic IDs


def codebooks(path, tensors, settings, method="balanced"):
    save_file(tensors, path, {"format": "onerec-quantizer", "version": "1", "method": method, "settings": settings})
    return path


@pytest.mark.parametrize(
    ("tensors", "settings"),
    [
        ({"codebook.1": np.ones((2, 2), dtype=np.float32)}, "{}"),
        ({"codebook.0": np.ones((2, 2), dtype=np.float32)}, "[]"),
        ({"codebook.0": np.ones((2, 2), dtype=np.float32)}, '{"clustering": "x"}'),
        ({"codebook.0": np.ones(2, dtype=np.float32)}, "{}"),
        ({"codebook.0": np.full((2, 2), np.nan, dtype=np.float32)}, "{}"),
        ({f"codebook.{i}": np.ones((2, 2 + i), dtype=np.float32) for i in range(2)}, "{}"),
    ],
)
def test_codebooks_that_do_not_fit(tmp_path, tensors, settings):
    with pytest.raises(ValueError, match=r"codebooks\.safetensors"):
        Quantizer.load(codebooks(tmp_path / "codebooks.safetensors", tensors, settings))


def test_codebooks_whose_settings_ask_for_terabytes(tmp_path):
    settings = {
        "input_size": 10**6,
        "hidden_sizes": [10**6],
        "codebook_sizes": [4],
        "latent_size": 10**6,
        "beta": 0.25,
    }
    path = codebooks(tmp_path / "c.safetensors", {"x": np.ones(1, dtype=np.float32)}, json.dumps(settings), "rq-vae")
    before = peak_mib()
    with pytest.raises(ValueError, match=r"c\.safetensors is damaged"):
        Quantizer.load(path)
    assert peak_mib() - before < 200


def test_codebooks_are_the_same_file_each_time(tmp_path):
    quantizer = ResidualQuantizer([3]).fit(np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32))
    files = {path: quantizer.save(tmp_path / path) for path in ("a", "b", "c", "d")}
    assert len({(tmp_path / path).read_bytes() for path in files}) == 1


def test_an_import_with_the_largest_code_and_a_collision(tmp_path):
    path = tmp_path / "x.index.json"
    path.write_text(json.dumps({key: ["<a_0>", "<b_2147483646>"] for key in "xy"}))
    before = peak_mib()
    catalogue, _ = read_index_json(path).to_catalogue("assign")
    assert catalogue.codes.tolist() == [[0, 2147483646], [0, 0]]
    assert peak_mib() - before < 100


@pytest.mark.parametrize("content", ["[]", "{}", '{"method": 3}', "\ud800"])
def test_a_report_that_is_none(tmp_path, content):
    path = tmp_path / "semantic_ids.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"semantic_ids\.json"):
        SemanticIDReport.load(path)


def test_an_import_of_more_dimensions_than_arrays_have(tmp_path):
    path = tmp_path / "ids.safetensors"
    path.write_bytes(save({"ids": np.zeros((1,) * 64, dtype=np.int64)}).replace(b'"shape":[1,', b'"shape":[1,1,'))
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little") + 2
    path.write_bytes(size.to_bytes(8, "little") + content[8:])
    with pytest.raises(ValueError, match=r"ids\.safetensors: expected shape \(levels, items\)"):
        read_grid_tensor(path)


def test_a_report_of_no_items(tmp_path):
    path = tmp_path / "semantic_ids.json"
    report = fit_semantic_ids(range(4), np.eye(4, dtype=np.float32), codebook_sizes=[2, 2]).report
    path.write_text(json.dumps({**report.as_dict(), "num_items": 0}))
    with pytest.raises(ValueError, match=r"semantic_ids\.json .*its num_items is 0"):
        SemanticIDReport.load(path)


# What stands in a checkpoint


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefact")
    catalogue = ItemCatalogue(["a", "b"], [[0, 1], [1, 0]], [2, 2])
    config = OneRecConfig(
        codebook_sizes=[2, 2], hidden_size=8, num_attention_heads=2, encoder_layers=1, decoder_layers=1, num_experts=2
    )
    model = OneRecForConditionalGeneration(config)
    model.set_catalogue(catalogue)
    model.save_pretrained(folder, include_code=False)
    OneRecProcessor.from_catalogue(catalogue).save_pretrained(folder, include_code=False)
    return folder


@pytest.fixture
def copy(artefact, tmp_path):
    return shutil.copytree(artefact, tmp_path / "shop")


def changed(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize(
    "entries",
    [
        {"encoder_layers": 10**9},
        {"decoder_layers": 4096},  # whose modules alone take ten seconds to make
        {"hidden_size": -8},
        {"head_dim": 10**12},
        {"codebook_sizes": [10**12]},
    ],
)
def test_sizes_that_no_model_has(copy, entries):
    changed(copy / "config.json", **entries)
    for read in (OneRecConfig.from_pretrained, lambda folder: load_model("--model", str(folder))):
        with pytest.raises(ValueError, match="shop"):
            read(copy)


@pytest.mark.parametrize("kind", [OneRecConfig, OneRecRewardConfig])
@pytest.mark.parametrize("content", ["[]", "null", "{", '{"rope_parameters": [[]]}', '{"id2label": 3}'])
def test_a_config_that_is_none(tmp_path, kind, content):
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop/config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match="shop"):
        kind.from_pretrained(tmp_path / "shop")


def test_weights_that_are_lacking_are_not_made_up(copy):
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if "encoder" in name)
    del weights[name]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="shop: 1 of the weights are not in its files"):
        load_model("--model", str(copy))


def test_another_model_is_no_generator(copy):
    (copy / "config.json").write_text(json.dumps({"model_type": "t5", "num_layers": 1, "d_model": 8, "vocab_size": 8}))
    with pytest.raises(ValueError, match="shop"):
        load_model("--model", str(copy))


@pytest.mark.parametrize("entry", [{"max_history": "all"}, {"max_history": 0}, {"max_history": [1]}])
def test_a_history_length_that_is_none(copy, entry):
    changed(copy / "processor_config.json", **entry)
    with pytest.raises(ValueError, match="max_history"):
        OneRecProcessor.from_pretrained(copy)


@pytest.mark.parametrize("sizes", [[None], "abc", [10**12, 2], [-1, 2], 7, [2, 2, 2**31 - 1, 2**31 - 1, 4]])
def test_codebook_sizes_of_a_tokenizer(copy, sizes):
    changed(copy / "tokenizer_config.json", codebook_sizes=sizes)
    with pytest.raises(ValueError, match="shop"):
        OneRecProcessor.from_pretrained(copy)


def test_special_tokens_are_where_they_belong(copy):
    tokens = json.loads((copy / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    changed(copy / "tokenizer_config.json", added_tokens_decoder={**tokens, str(10**20): tokens.pop("0")})
    with pytest.raises(ValueError, match="ids 0 to 3"):
        OneRecProcessor.from_pretrained(copy)


def test_a_catalogue_whose_codes_were_changed(copy):
    path = copy / "catalogue.safetensors"
    content = path.read_bytes()
    at = content.index(np.array([[0, 1], [1, 0]], dtype=np.int32).tobytes())
    path.write_bytes(content[:at] + b"\x7f" + content[at + 1 :])
    with pytest.raises(ValueError, match="shop"):
        load_processor("--model", str(copy))


def test_items_of_a_reward_model_that_are_no_text(tmp_path):
    keys = np.array([[255]], dtype=np.uint8)
    (tmp_path / "reward_items.safetensors").write_bytes(save({"item_ids": keys}, {"format": "onerec-reward-items"}))
    with pytest.raises(ValueError, match=r"reward_items\.safetensors"):
        RewardItems.load(tmp_path / "reward_items.safetensors")


def test_an_adapter_on_itself(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ValueError, match="adapters on each other"):
        check_weights(tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_an_index_of_weights_that_is_none(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json"):
        check_weights(tmp_path)


# What commands read


def bomb() -> str:
    names = "abcdefghi"
    text = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for before, name in itertools.pairwise(names):
        text += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    return text + "user_column: *i\n"


@pytest.mark.parametrize(
    "content",
    [
        bomb(),
        "",
        "[]",
        "3",
        "user_column: [",
        "1: 2",
        "max_history: x",
        "max_history: [[1]]",
        "stride: " + "[" * 5_000,
        "a: &a [*a]",
    ],
)
def test_options_that_are_none(tmp_path, content):
    path = tmp_path / "options.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"options\.yaml"):
        parse((DataSettings,), ["--config", str(path)], "train")


@pytest.mark.parametrize(
    "row", [{"history": 3}, {"history": ["m1", 2]}, {"history": None}, {"history": [["m1"]]}, {"history": ["m9"]}]
)
def test_pairs_that_are_no_lists_of_items(tmp_path, row):
    processor = OneRecProcessor.from_catalogue(ItemCatalogue(["m1", "m2"], [[0], [1]], [2]))
    path = lines(tmp_path / "pairs.jsonl", {"history": ["m1"], "chosen": ["m1"], "rejected": ["m2"], **row})
    with pytest.raises(ValueError, match=r"pairs\.jsonl"):
        read_preferences(str(path), processor)


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '["\\ud800"]', "9" * 5_000, '{"history": 3}', "nothing", json.dumps(["x" * 9_000])]
)
def test_histories_that_are_none(tmp_path, line):
    catalogue = ItemCatalogue(["m1", "m2"], [[0], [1]], [2])
    recommender = Recommender(make_model(catalogue), OneRecProcessor.from_catalogue(catalogue))
    path = lines(tmp_path / "histories.jsonl", '["m1"]', line)
    with pytest.raises(ValueError, match=r"histories\.jsonl: line 2") as refusal, naming_file(str(path)):
        _ = [resolve_line(recommender, number, request, RecommendArguments()) for number, request in read_file(path)]
    assert len(str(refusal.value)) < 1_000


def test_a_long_option_is_not_repeated_whole(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(f"? {'x' * 8_000}\n: 1\n")
    for read in (lambda: recipe_options(str(path)), lambda: parse((DataSettings,), ["--config", str(path)], "train")):
        with pytest.raises(ValueError, match=r"options\.yaml.*option -{0,2}xxx") as refusal:
            read()
        assert len(str(refusal.value)) < 1_000


@pytest.mark.parametrize("value", ["[8, -.inf]", "-.inf", "[8, -x]"])
def test_a_value_of_a_list_that_looks_like_an_option(tmp_path, value):
    path = tmp_path / "options.yaml"
    path.write_text(f"codebook_sizes: {value}\n")
    with pytest.raises(ValueError, match=r"options\.yaml.*--codebook_sizes: .*-(inf|x)"):
        parse((SemanticIDSettings,), ["--config", str(path)], "train")
