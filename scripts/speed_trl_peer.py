"""The other side of speed_trl.py: a short run of trl's GRPOTrainer. Prints when its steps ended, as JSON.

    speed_trl_peer.py STEPS SEED BATCH GROUP EPOCHS MINIBATCHES DIGITS

Imports nothing of the zoo, so that it runs in a virtual environment that holds only trl.
"""

import json
import sys
import tempfile
import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def run(
    steps: int, seed: int, batch_size: int, group_size: int, epochs: int, minibatches: int, num_digits: int
) -> list[float]:
    """The times in seconds at which the updates of each batch were done."""
    torch.set_num_threads(1)
    words = [*map(str, range(10)), "sort", "reverse", "end"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="end"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    processing = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="end", pad_token="end")
    digits = torch.randint(
        10, (steps * batch_size // group_size, num_digits), generator=torch.Generator().manual_seed(seed)
    )
    prompts = [" ".join([*map(str, row), "sort"]) for row in digits.tolist()]
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(words), n_positions=2 * num_digits + 1, n_embd=64, n_layer=2, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=12, eos_token_id=12,
        )
    )  # fmt: skip

    def reward(prompts, completion_ids, **_) -> list[float]:
        """The share of right digits."""
        answers = [sorted(map(int, prompt.split()[:-1])) for prompt in prompts]
        pairs = zip(answers, completion_ids, strict=True)
        return [sum(a == b for a, b in zip(answer, ids, strict=True)) / num_digits for answer, ids in pairs]

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % (epochs * minibatches) == 0:
                times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, seed=seed, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
            save_strategy="no", logging_strategy="no", gradient_checkpointing=False, learning_rate=1e-3,
            per_device_train_batch_size=batch_size // minibatches, steps_per_generation=minibatches,
            num_iterations=epochs, num_generations=group_size, max_completion_length=num_digits, beta=0.05,
            loss_type="dr_grpo", scale_rewards="none", epsilon=0.2, max_grad_norm=1.0, temperature=1.0,
            max_steps=steps * epochs * minibatches, generation_kwargs={"min_new_tokens": num_digits},
        )  # fmt: skip
        model.save_pretrained(f"{folder}/model")  # the reference is read from where the policy came from
        policy = GPT2LMHeadModel.from_pretrained(f"{folder}/model")
        trainer = GRPOTrainer(
            policy, reward, settings, Dataset.from_dict({"prompt": prompts}), processing_class=processing,
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return times


if __name__ == "__main__":
    print(json.dumps(run(*map(int, sys.argv[1:]))))
