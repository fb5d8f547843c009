"""What the tests of Seq2SeqDPOTrainer share: tiny T5, Bart and OneRec models, their pairs, and scores by hand."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from onerec_hf import OneRecProcessor
from onerec_hf.trainers import Seq2SeqDPOConfig, Seq2SeqDPOTrainer
from tests.conftest import make_catalogue, make_model

CATALOGUE = make_catalogue(30, (4, 4, 4))
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, max_history=5)
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "log", "far", "away", "red", "blue"]
ALL_LOSSES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]


def make_tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZER = make_tokenizer()


def make_t5(seed=0, **settings):
    torch.manual_seed(seed)
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, **tokens, **settings)
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():  # T5's own start is nearly uniform
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def bart_config(cls=BartConfig):
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    return cls(vocab_size=32, init_std=0.3, forced_eos_token_id=None, **tokens, **sizes, **heads)


def make_bart(seed=0):
    torch.manual_seed(seed)
    return BartForConditionalGeneration(bart_config()).eval()


def text_pairs(count=8):
    return Dataset.from_list(
        [
            {
                "prompt": " ".join(WORDS[(i + j) % 13] for j in range(2 + i % 3)),
                "chosen": " ".join(WORDS[(i * 3 + j) % 13] for j in range(1 + i % 3)),
                "rejected": " ".join(WORDS[(i * 5 + j + 1) % 13] for j in range(3 - i % 3)),
            }
            for i in range(count)
        ]
    )


def item_pairs(count=8):
    return Dataset.from_list(
        [
            {
                "history": [f"m{(i + j) % 30}" for j in range(1 + i % 6)],
                "chosen": [f"m{(i + 7 + j) % 30}" for j in range(1 + i % 2)],
                "rejected": [f"m{(i + 15 + j) % 30}" for j in range(2 - i % 2)],
            }
            for i in range(count)
        ]
    )


MAKERS = {"t5": make_t5, "bart": make_bart, "onerec": lambda: make_model(CATALOGUE)}


def pairs_for(kind, count=8):
    return item_pairs(count) if kind == "onerec" else text_pairs(count)


def arguments(folder, **settings):
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "activation_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 1,
    }
    return Seq2SeqDPOConfig(str(folder), **{**defaults, **settings})


def make_trainer(
    folder, kind="onerec", model=None, train_dataset=None, callbacks=None, peft_config=None, ref_model=None, **settings
):
    return Seq2SeqDPOTrainer(
        MAKERS[kind]() if model is None else model,
        ref_model=ref_model,
        args=arguments(folder, **settings),
        train_dataset=pairs_for(kind) if train_dataset is None else train_dataset,
        eval_dataset=pairs_for(kind, 5),
        processing_class=PROCESSOR if kind == "onerec" else TOKENIZER,
        callbacks=callbacks,
        peft_config=peft_config,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@torch.no_grad()
def by_hand(model, kind, row, which):
    """log-probability of one answer: a single row without padding through the model's own forward."""
    if kind == "onerec":
        inputs = PROCESSOR([row["history"]], sessions=[row[which]])
        source, decoder, labels = inputs["input_ids"], inputs["decoder_input_ids"], inputs["labels"]
    else:
        source = torch.tensor([TOKENIZER(row["prompt"])["input_ids"]])
        labels = torch.tensor([[*TOKENIZER(row[which])["input_ids"], 2]])
        decoder = torch.cat([torch.tensor([[0 if kind == "t5" else 2]]), labels[:, :-1]], dim=1)
    logps = model.eval()(input_ids=source, decoder_input_ids=decoder).logits.log_softmax(-1)
    return sum(float(logps[0, i, label]) for i, label in enumerate(labels[0].tolist()) if label != -100), int(
        (labels != -100).sum()
    )
