"""Supervised fine-tuning: trl's SFTTrainer with what a run needs."""

from __future__ import annotations

from typing import Any

from trl import SFTConfig, SFTTrainer

from finetune.train.loss import use_token_head
from finetune.train.trainer import RunTrainer

# The keys that trl sets in the config of a model with experts.
_ROUTER_KEYS = ("output_router_logits", "router_aux_loss_coef")


class SftTrainer(RunTrainer, SFTTrainer):  # type: ignore[misc]
    """trl's SFTTrainer on prepared rows.

    Args:
        model: The model to train, with its adapter.
        args: The trainer's arguments.
        train_dataset: The training rows, with `row`, `input_ids` and `labels`.
        eval_dataset: The evaluation rows; None: no evaluation.
        processing_class: The tokenizer.
    """

    def __init__(self, model: Any, args: SFTConfig, train_dataset: Any, eval_dataset: Any, processing_class: Any):
        trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        text_config = model.config.get_text_config()
        router = {name: getattr(text_config, name) for name in _ROUTER_KEYS if hasattr(text_config, name)}
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
        )
        is_adapter = hasattr(self.model, "peft_config")
        if is_adapter:
            # trl 1.16 (sft_trainer.py) casts a quantised model's adapter to bfloat16 in every run, which also rounds
            # its initial values.
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.data = trained[name]
        whole = self.model.get_base_model() if is_adapter else self.model
        use_token_head(whole, compiled=args.torch_compile)
        # transformers 5.23 counts no tokens for models of images with text (`accepts_loss_kwargs`), as their own loss
        # would ignore the count: the loss of accumulated batches would be a mean of means. trl 1.16 computes the loss
        # itself.
        self.model_accepts_loss_kwargs = True
        # trl 1.16 turns the router's logits on in the config (`SFTTrainer.__init__`), and asks for them with every
        # batch anyway (`compute_loss`). Left on, they make `generate` fail on a padded batch, here and with what is
        # saved.
        for name, value in router.items():
            setattr(text_config, name, value)
