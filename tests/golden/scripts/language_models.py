"""Small language models as Transformers saves them, with their logits; tokens and training steps of TRL's `DPOTrainer`.

Needs torch 2.13.0, transformers 5.24.0, tokenizers 0.23.3, safetensors 0.8.0, accelerate 1.15.0, datasets 5.2.0 and
trl 1.16.0; the tests do not: they read the folder `language_models`, made in a minute or two by

    HF_HUB_OFFLINE=1 python tests/golden/scripts/language_models.py

Numbers called exact are in float64 throughout. Transformers casts to float32 in norms, rotary positions and the softmax
of attention, whatever the type of the model, and TRL in its fused output layer: for exact numbers these parts are
replaced by those under "Float64" below.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import datasets
import numpy as np
import torch
import trl.trainer.utils
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

VERSIONS = {"torch": "2.13.0", "transformers": "5.24.0", "tokenizers": "0.23.3", "safetensors": "0.8.0"}
VERSIONS |= {"accelerate": "1.15.0", "datasets": "5.2.0", "trl": "1.16.0"}
FOLDER = Path(__file__).parents[1] / "language_models"
CHAT_MODEL = FOLDER / "chat_model"


def main() -> None:
    found = {name: version(name).partition("+")[0] for name in VERSIONS}
    assert found == VERSIONS, f"this script is for {VERSIONS}, found {found}"
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # a sum over threads depends on their number
    shutil.rmtree(FOLDER, ignore_errors=True)
    write_models()
    write_chat_model()
    np.savez_compressed(FOLDER / "logits.npz", **logits_of_models())
    write_json("tokens.json", settings={"truncated_to": MAX_LENGTH}, **tokens_of_rows())
    pairs = tokenized_pairs()
    arrays, settings = training(pairs)
    np.savez_compressed(FOLDER / "training.npz", **arrays)
    write_json("training.json", settings=settings, pairs=pairs)


def write_json(name: str, *, settings: dict, **tables: list[dict]) -> None:
    """Writes tables, one row per line."""
    parts = [f'"versions": {json.dumps(VERSIONS)}', f'"settings": {json.dumps(settings)}']
    for table, rows in tables.items():
        lines = ",\n".join(json.dumps(row) for row in rows)
        parts.append(f'"{table}": [\n{lines}\n]')
    (FOLDER / name).write_text("{" + ",\n".join(parts) + "}\n")


# Models ---------------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"vocab_size": 64, "intermediate_size": 32, "max_position_embeddings": 128, "tie_word_embeddings": False}
SMALL |= {"bos_token_id": 0, "eos_token_id": 1}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}  # of four wavelengths one is kept, one is between, two are stretched
CONFIGS = {
    "llama_tied": LlamaConfig(**SMALL | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama3_scaled": LlamaConfig(
        **SMALL | {"rope_parameters": LLAMA3, "head_dim": 8, "num_key_value_heads": 1, "vocab_size": 72}
    ),
    "llama_linear": LlamaConfig(
        **SMALL | {"num_hidden_layers": 3, "intermediate_size": 24, "attention_bias": True, "mlp_bias": True},
        rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    ),
    "qwen2": Qwen2Config(
        **SMALL | {"tie_word_embeddings": True, "num_key_value_heads": 4, "vocab_size": 80},
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    ),
    "qwen3": Qwen3Config(**SMALL | {"head_dim": 8, "intermediate_size": 24}),
    "llama_sharded_bf16": LlamaConfig(**SMALL | {"vocab_size": 96, "intermediate_size": 40, "rms_norm_eps": 1e-5}),
}
OLD_CONFIG = {  # as Transformers 4 wrote the configuration of `llama_tied`
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.44.2",
    "use_cache": True,
    "vocab_size": 64,
}


def write_models() -> None:
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = random_model(config, seed)
        if name == "llama_sharded_bf16":
            save(model.to(torch.bfloat16), FOLDER / name, max_shard_size="8KB")
        else:
            save(model, FOLDER / name)
    shutil.copytree(FOLDER / "llama_tied", FOLDER / "llama_old_config")
    (FOLDER / "llama_old_config" / "config.json").write_text(json.dumps(OLD_CONFIG, indent=2) + "\n")


def random_model(config: PreTrainedConfig, seed: int) -> torch.nn.Module:
    """A model whose norms are not ones and whose biases are not zeros."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        draws = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * draws if "norm" in name else (0.5 if "embed" in name else 0.3) * draws
    return model


def save(model: torch.nn.Module, folder: Path, **options) -> None:
    model.save_pretrained(folder, **options)
    (folder / "generation_config.json").unlink()


def load(folder: Path, **changes) -> torch.nn.Module:
    """The model of a folder, perhaps with changes of its configuration."""
    options = {"dtype": torch.float32, "attn_implementation": "eager", **changes}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits_of_models() -> dict[str, np.ndarray]:
    """For each folder: tokens, logits, and log-probabilities of the tokens behind the eighth, given the first eight."""
    arrays = {}
    for seed, name in enumerate([*CONFIGS, "llama_old_config"]):
        model = load(FOLDER / name)
        generator = torch.Generator().manual_seed(100 + seed)
        tokens = torch.randint(model.config.vocab_size, (3, 20), generator=generator)
        arrays[f"{name}/tokens"] = tokens.numpy().astype(np.int32)
        arrays[f"{name}/logits"] = model(tokens).logits.numpy()
        with exact():
            logits = model.double()(tokens).logits
        arrays[f"{name}/exact_logits"] = logits.numpy()
        arrays[f"{name}/exact_logps"] = sum_of_logps(logits, tokens, start=8).numpy()
    return arrays


def sum_of_logps(logits: torch.Tensor, tokens: torch.Tensor, start: int) -> torch.Tensor:
    """The log-probability of the tokens from `start` on, given those before, for each row."""
    logps = logits[:, start - 1 : -1].log_softmax(-1)
    return logps.gather(-1, tokens[:, start:, None]).sum((1, 2))


# Float64 --------------------------------------------------------------------------------------------------------------


@contextmanager
def exact() -> Iterator[None]:
    """Within it, models in float64 compute in float64 alone."""
    with ExitStack() as stack:
        for family, module in (("Llama", modeling_llama), ("Qwen2", modeling_qwen2), ("Qwen3", modeling_qwen3)):
            for replacement in patches(family, module):
                stack.enter_context(replacement)
        head = SimpleNamespace(apply=output_layer)
        stack.enter_context(patch.object(trl.trainer.utils, "_ChunkedLogProbFunction", head))
        yield


def patches(family: str, module: ModuleType) -> list:
    return [
        patch.object(getattr(module, f"{family}RMSNorm"), "forward", norm),
        patch.object(getattr(module, f"{family}RotaryEmbedding"), "forward", rotary),
        patch.object(module, "eager_attention_forward", attention),
    ]


def norm(self, states: torch.Tensor) -> torch.Tensor:
    assert states.dtype == self.weight.dtype == torch.float64
    return self.weight * states * (states.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def rotary(self, states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    assert states.dtype == torch.float64
    angles = position_ids[..., None].double() * frequencies(self.config)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def frequencies(config: PreTrainedConfig) -> torch.Tensor:
    """Radians per position, for each pair of coordinates."""
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if rope["rope_type"] == "default":
        return plain
    if rope["rope_type"] == "linear":
        return plain / rope["factor"]
    assert rope["rope_type"] == "llama3"
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * plain + (1 - kept) * plain / rope["factor"]


def attention(module, query, key, value, attention_mask, scaling, **_) -> tuple[torch.Tensor, None]:
    assert query.dtype == attention_mask.dtype == torch.float64
    key, value = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
    weights = (query @ key.mT * scaling + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def output_layer(hidden, weight, bias, targets, *_) -> tuple:
    """What TRL's fused layer returns: log-probabilities, entropies, nothing, mean logits, and hits of the argmax."""
    assert hidden.dtype == torch.float64 and bias is None
    logits = hidden @ weight.T
    logps = logits.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, targets[:, None])[:, 0], entropy, None, logits.mean(-1), logits.argmax(-1) == targets


# Tokenizer ------------------------------------------------------------------------------------------------------------

END_OF_TEXT, START, END = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a careful helper that answers in one short sentence<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
SENTENCES = """\
You are a careful helper that answers in one short sentence
system user assistant
The cat sat on the mat and looked at the rain outside.
The dog ran over the hill, and then it ran back again.
What is the capital of France? The capital of France is Paris.
What is the capital of Japan? The capital of Japan is Tokyo.
How do I boil an egg? Put the egg in boiling water for seven minutes.
How do I make tea? Pour hot water over the leaves and wait for three minutes.
Why is the sky blue? Because air scatters blue light more than red light.
Why do leaves turn red? Because the green in them is gone before winter.
Please write a short poem about the sea and the wind.
Please name three colours that you can see in the garden.
I do not know, but I can help you to find out.
I am sorry, I cannot help you with that.
Two and two make four; three and three make six.
The sum of 12 and 30 is 42, and half of it is 21.
She reads a book in the evening when the house is quiet.
He walks to the station in the morning when the street is empty.
Water freezes at 0 degrees and boils at 100 degrees.
The train leaves at 8:15 and arrives at 9:45.
A short answer is often better than a long answer.
Is it better to save time or to save money? That depends on what you need.
Can you tell me where the nearest bakery is? It is behind the church.
Could you say that again, please? Of course, here it is again.
The café on the corner sells crème brûlée and naïve paintings.
There were ten birds on the wire, and then there were none.
If you want to learn, read; if you want to remember, write.
The moon goes around the earth, and the earth goes around the sun.
First mix the flour and the water. Then let the dough rest for one hour.
You should drink water, sleep well and walk in the sun.
No, that is not true: the whale is not a fish.
Yes, that is true: the bat is not a bird.\
"""
LINES = "\n\n".join("1234567890") + "\n\n\n  - one\n  - two\n"  # for a token of two new lines


def write_chat_model() -> None:
    """A folder with a model, and a tokenizer and template like those of SmolLM2-Instruct."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES.split("\n"), LINES], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END, unk_token=END_OF_TEXT
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(CHAT_MODEL)
    ids = dict(zip(("unk_token_id", "bos_token_id", "eos_token_id"), range(3), strict=True))
    config = LlamaConfig(
        **SMALL | ids | {"tie_word_embeddings": True, "vocab_size": len(wrapped)},
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )
    save(random_model(config, seed=len(CONFIGS)), CHAT_MODEL)


def load_tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(CHAT_MODEL)


# Tokens of preferences ------------------------------------------------------------------------------------------------

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
MAX_LENGTH = 64  # tokens, of truncated sequences


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def explicit(prompt: list[dict[str, str]], chosen: str, rejected: str) -> dict[str, list]:
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def implicit(prompt: list[dict[str, str]], chosen: str, rejected: str) -> dict[str, list]:
    return {"chosen": [*prompt, assistant(chosen)], "rejected": [*prompt, assistant(rejected)]}


def text(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


DIALOGUE = [user("What is the capital of Japan?"), assistant("Tokyo."), user("And of France?")]
ROWS = {
    "explicit": {
        "plain": explicit([user("Why is the sky blue?")], "Air scatters blue light.", "I do not know."),
        "system": explicit([system("Be kind."), user("How do I make tea?")], "Pour hot water over leaves.", "No."),
        "several turns": explicit(DIALOGUE, "Paris.", "The capital of France is Tokyo."),
        "system and several turns": explicit([system("Answer in one word."), *DIALOGUE], "Paris", "It is Paris."),
        "unicode": explicit([user("Say hello, s'il vous plaît 🙂")], "Grüß Gott 👋🏽 — 你好!", "नमस्ते, cafe\u0301"),
        "white space behind": explicit([user("Name a colour.")], "Blue. \n", "Red.\n\n"),
        "space in front": explicit([user("Name a bird.")], " Owl", "Owl"),
        "lines": explicit([user("Name\n\nthree birds.")], "- owl\n- crow\n\n- wren", "owl,\tcrow"),
        "empty response": explicit([user("Say nothing.")], "", "Nothing."),
        "special token in the text": explicit([user("How does a turn end?")], "With <|im_end|> alone.", "It stops."),
        # the new line that ends the prompt merges with the response's: TRL shortens the prompt
        "lines in front": explicit([user("Leave a line.")], "\n\nHere it is.", "Here it is."),
        "long": explicit([user("Is it better to save time or to save money? " * 3)], "Time. " * 9, "Money."),
    },
    "implicit": {
        "implicit": implicit([user("Is a whale a fish?")], "No, it is not.", "Yes."),
        "implicit, with system": implicit([system("Be short."), user("Is a bat a bird?")], "No.", "Yes, it is."),
        "implicit, several turns": implicit(DIALOGUE, "Paris.", "Rome."),
    },
    "text": {
        "text": text("The capital of France is", " Paris.", " a city in France."),
        "text that ends": text("Two and two make", " four.<|im_end|>", " five."),
        "text with white space": text("Question: why?\nAnswer:", " Because\n\nit is so. \n", " No reason 🙂"),
        # the space at the end of the prompt merges with the word behind it: TRL shortens the prompt
        "text that merges": text("The capital of Japan is ", "Tokyo.", "Paris."),
    },
    "implicit text": {
        "implicit text": {"chosen": "The sea is blue and wide.", "rejected": "The sea is blue and red."},
    },
}


def tokens_of_rows() -> dict[str, list[dict]]:
    """Rows with the tokens of TRL and of Transformers, and what TRL's collator makes of rows that are too long."""
    tokenizer = load_tokenizer()
    rows = []
    for form, named in ROWS.items():
        made = tokenize_by_trl(named, max_length=None).train_dataset
        for (name, row), tokens in zip(named.items(), made, strict=True):
            entry = {"name": name, "form": form, "row": row, "trl": {key: tokens[key] for key in IDS}}
            if form != "implicit text":
                entry["transformers"] = tokenize_by_transformers(tokenizer, row)
            rows.append(entry)
    return {"rows": rows, "truncated": [*truncated("keep_start"), *truncated("keep_end")]}


def tokenize_by_trl(named: dict[str, dict], **options) -> DPOTrainer:
    """A trainer with rows of one form."""
    dataset = Dataset.from_list([{"name": name, **row} for name, row in named.items()])
    return new_trainer(load(CHAT_MODEL), dataset, **options)


def tokenize_by_transformers(tokenizer: PreTrainedTokenizerFast, row: dict) -> dict:
    """The text and tokens of the prompt, and of the prompt with each response; without what TRL adds."""
    if isinstance(row["chosen"], str):
        texts = {"prompt": row["prompt"]}
        texts |= {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
        return {"texts": texts, **{name: tokenizer(text)["input_ids"] for name, text in texts.items()}}
    prompt = row.get("prompt", row["chosen"][:-1])
    dialogues = {side: [*prompt, row[side][-1]] for side in ("chosen", "rejected")}
    calls = {"prompt": (prompt, True), "prompt_without_generation_prompt": (prompt, False)}
    calls |= {side: (dialogue, False) for side, dialogue in dialogues.items()}

    def apply(messages, add_generation_prompt, *, tokenize):
        options = {"return_dict": False} if tokenize else {}
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=tokenize, **options
        )

    texts = {name: apply(*call, tokenize=False) for name, call in calls.items()}
    return {"texts": texts, **{name: apply(*call, tokenize=True) for name, call in calls.items()}}


def truncated(truncation_mode: str) -> Iterator[dict]:
    """What TRL keeps of explicit conversations; rows that it drops have no entry."""
    trainer = tokenize_by_trl(ROWS["explicit"], max_length=MAX_LENGTH, truncation_mode=truncation_mode)
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        entry = {"name": row["name"], "truncation_mode": truncation_mode}
        for side, name in enumerate(("chosen", "rejected")):
            is_token = batch["attention_mask"][side].bool()
            entry[f"{name}_input_ids"] = batch["input_ids"][side][is_token].tolist()
            entry[f"{name}_completion_mask"] = batch["completion_mask"][side][is_token].tolist()
        yield entry


# Training -------------------------------------------------------------------------------------------------------------

STEPS, BATCH_SIZE, BETA = 50, 4, 0.1
RUNS = {
    "sigmoid": {},
    "ipo": {},
    "hinge": {},
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 0.001},
    "nca_pair": {},
    "apo_zero": {},
    "apo_down": {},
    "sppo_hard": {},
    "aot": {},
    "aot_unpaired": {},
    "discopop": {"discopop_tau": 0.05},
    "sigmoid_norm": {},
}
WITH_PARAMETERS = ("sigmoid", "ipo", "sigmoid_exact", "sigmoid_padding_idx")
METRICS = {"rewards/chosen": "rewards_chosen", "rewards/rejected": "rewards_rejected", "grad_norm": "grad_norm"}
SETTINGS = ("beta", "learning_rate", "lr_scheduler_type", "optim", "adam_beta1", "adam_beta2", "adam_epsilon")
SETTINGS += ("weight_decay", "max_grad_norm", "max_length")
KIND = system("Be kind.")
PAIRS = [
    explicit([user("What is the capital of France?")], "The capital of France is Paris.", "It is Rome."),
    explicit([user("What is the capital of Japan?")], "Tokyo.", "I do not know the capital of Japan."),
    explicit([user("Why is the sky blue?")], "Because air scatters blue light.", "Because it is."),
    explicit([user("How do I boil an egg?")], "Put it in hot water for seven minutes.", "You wait."),
    explicit([user("How do I make tea?")], "Pour hot water over the leaves.", "Tea is bad, and so are you."),
    explicit([user("Is a whale a fish?")], "No.", "Yes, the whale is a fish that lives in the sea."),
    explicit([user("Is a bat a bird?")], "No, it is not.", "Yes, it is."),
    explicit([user("Name three colours.")], "Red, green and blue.", "Red."),
    explicit([KIND, user("I am lost.")], "I can help you to find the station.", "That is not true."),
    explicit([KIND, user("I cannot sleep.")], "Walk in the evening, and read.", "So what? 🙄"),
    explicit([user("What is 12 and 30?")], "42", "It is 12 and 30, or 1230."),
    explicit([user("What is half of 42?")], "21", "12"),
    explicit([user("When does the train leave?")], "At 8:15.", "In the morning, when the street is empty."),
    explicit([user("Say hello.")], "Hello! 🙂", "No."),
    explicit([user("Where is the bakery?")], "It is behind the church.", "Outside."),
    explicit(DIALOGUE, "Paris.", "Tokyo."),
    explicit([user("Name a bird."), assistant("Owl."), user("Another?")], "Crow.", "Owl, owl, owl."),
    explicit([user("What is at the café?")], "Crème brûlée.", "Paintings."),
    explicit([user("Write a line about the sea.")], "The sea is wide,\nand the wind is its guide.", "Sea."),
    explicit([user("Should I drink water?")], "Yes, you should.", "That depends on what you need to save."),
    explicit([user("Why do leaves turn red?")], "The green in them is gone.", "They read a book."),
    explicit([user("At what point does water freeze?")], "At 0 degrees.", "At 100 degrees."),
    explicit([user("Is it better to read or to write?")], "To remember, write.", "It is better to sleep."),
    explicit([user("Tell me a secret.")], "I am sorry, I cannot.", "The moon goes around the sun."),
]


def training(pairs: list[dict]) -> tuple[dict[str, np.ndarray], dict]:
    """The steps of each run, log-probabilities before and after, and the settings of all runs."""
    with exact():
        initial = pair_logps(load(CHAT_MODEL).double(), pairs[:8])
        arrays = {f"initial/exact_{side}_logps": logps for side, logps in initial.items()}
        arrays |= run("sigmoid_exact", pairs, dtype=torch.float64)
    for name, options in RUNS.items():
        arrays |= run(name, pairs, loss_type=[name], **options)
    # SmolLM2's configuration names the end token as padding. Transformers then drops the gradient of its embedding as
    # input, in every place, and keeps that as output.
    arrays |= run("sigmoid_padding_idx", pairs, changes={"pad_token_id": 2})
    settings = {"steps": STEPS, "batch_size": BATCH_SIZE, "runs": RUNS}
    arguments = new_trainer(load(CHAT_MODEL), Dataset.from_list(PAIRS)).args
    return arrays, settings | {name: getattr(arguments, name) for name in SETTINGS}


class Recorder(DPOTrainer):
    """Takes rows in order, and keeps losses as they are: those of the log are rounded to float32."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.losses: list[float] = []

    def _get_train_sampler(self, *_, **__):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def _compute_loss(self, model, inputs, return_outputs):
        loss = super()._compute_loss(model, inputs, return_outputs)
        self.losses.append(loss.item())
        return loss


def new_trainer(model: torch.nn.Module, dataset: Dataset, **options) -> Recorder:
    """A trainer with AdamW at a constant rate, and the model at the start as reference."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            beta=BETA,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        reference = load(CHAT_MODEL).to(model.dtype)
        trainer = Recorder(
            model=model, ref_model=reference, args=arguments, train_dataset=dataset, processing_class=load_tokenizer()
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def tokenized_pairs() -> list[dict]:
    """The pairs, with TRL's tokens."""
    rows = new_trainer(load(CHAT_MODEL), Dataset.from_list(PAIRS)).train_dataset
    return [pair | {key: row[key] for key in IDS} for pair, row in zip(PAIRS, rows, strict=True)]


def run(
    name: str, pairs: list[dict], *, dtype: torch.dtype = torch.float32, changes: dict | None = None, **options
) -> dict[str, np.ndarray]:
    """Numbers of each step, log-probabilities of the first batch after the last step, and perhaps the parameters."""
    model = load(CHAT_MODEL, **changes or {}).to(dtype)
    assert model.get_input_embeddings().padding_idx == (changes or {}).get("pad_token_id")
    trainer = new_trainer(model, Dataset.from_list(PAIRS), **options)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(trainer.losses) == len(log) == STEPS
    arrays = {f"{name}/loss": np.array(trainer.losses)}
    arrays |= {f"{name}/{to}": np.array([entry[key] for entry in log]) for key, to in METRICS.items()}
    final = pair_logps(model.eval(), pairs[:BATCH_SIZE])
    arrays |= {f"{name}/final_{side}_logps": logps for side, logps in final.items()}
    if name in WITH_PARAMETERS:
        for key, parameter in model.named_parameters():
            arrays[f"{name}/parameters/{key}"] = parameter.detach().numpy()
    return arrays


@torch.no_grad()
def pair_logps(model: torch.nn.Module, pairs: list[dict]) -> dict[str, np.ndarray]:
    """The log-probability of each response, without padding."""
    logps = {}
    for side in ("chosen", "rejected"):
        values = []
        for pair in pairs:
            prompt, response = pair["prompt_ids"], pair[f"{side}_ids"]
            tokens = torch.tensor([prompt + response])
            values.append(sum_of_logps(model(tokens).logits, tokens, start=len(prompt)))
        logps[side] = torch.cat(values).numpy()
    return logps


if __name__ == "__main__":
    main()
