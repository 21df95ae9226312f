"""Language models that nobody here wrote (transformers, random weights): their heads, their losses, their trainers."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from heads import counts, deferred

import fused_ops

transformers = pytest.importorskip("transformers", reason="needs the models extra: pip install 'fused_ops[models]'")
WORDS = 101


pytestmark = pytest.mark.usefixtures("heads_of_any_size")


def decoder(name, **options):
    def build():
        config = getattr(transformers, f"{name}Config")(
            vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, **options,
        )  # fmt: skip
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return build


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def t5():
    config = transformers.T5Config(
        vocab_size=WORDS, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def bart(kind="Bart", **options):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=WORDS, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, decoder_start_token_id=2, **options,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    if kind == "Bart":
        model.final_logits_bias.normal_()
    return model


MODELS = {
    "Llama": decoder("Llama"),
    "Llama, tied": decoder("Llama", tie_word_embeddings=True),
    "Gemma 2": decoder("Gemma2", head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0),
    "Cohere": decoder("Cohere", logit_scale=0.3),
    "Granite": decoder("Granite", logits_scaling=3.0),
    "Qwen 2": decoder("Qwen2"),
    "Qwen 3": decoder("Qwen3", head_dim=8),
    "GPT-2": gpt2,
    "T5": t5,
    "BART": bart,
    "Whisper": lambda: bart("Whisper", num_mel_bins=8, max_source_positions=20, max_target_positions=32),
}


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    for option in ("dropout", "attention_dropout", "activation_dropout"):
        for module in model.modules():
            if isinstance(getattr(module, option, None), float):
                setattr(module, option, 0.0)
    return model


def batch(name):
    torch.manual_seed(1)
    ids = torch.randint(3, WORDS, (3, 9))
    labels = ids.clone()
    labels[0, :5] = -100
    if name == "Whisper":
        return {"input_features": torch.randn(3, 8, 40), "labels": labels}
    return {"input_ids": ids, "labels": labels}


def widened(batch):
    return {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}


def step(model, batch, context):
    """The loss and all gradients, as one vector in float64."""
    model.zero_grad()
    with context:
        output = model(**batch)
    output.loss.backward()
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return output, torch.cat([output.loss.detach().double().view(1), *grads])


@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_its_own_loss(name, how):
    """In training mode, against float64; the logits were not needed, and are there when they are asked for."""
    theirs, inputs = build(name), batch(name)
    exact = copy.deepcopy(theirs).double()
    if how == "bfloat16":
        theirs = theirs.bfloat16()
        exact.load_state_dict(theirs.state_dict())
        inputs = {k: t.bfloat16() if t.is_floating_point() else t for k, t in inputs.items()}
    ours = copy.deepcopy(theirs)
    fused_ops.convert(ours, loss=F.cross_entropy)

    def context():
        return torch.autocast("cpu", torch.bfloat16) if how == "autocast" else contextlib.nullcontext()

    _, truth = step(exact, widened(inputs), contextlib.nullcontext())
    expected, eager = step(theirs, inputs, context())
    output, found = step(ours, inputs, context())
    assert counts(ours) == (1, {})
    assert deferred(output.logits) and output.logits.dtype == expected.logits.dtype
    assert output.loss.dtype == expected.loss.dtype
    eps = torch.finfo(torch.float32 if how == "float32" else torch.bfloat16).eps
    assert (found - truth).norm() <= 1.2 * (eager - truth).norm() + eps * truth.norm()
    torch.testing.assert_close(output.logits.detach(), expected.logits.detach(), rtol=0, atol=0)
    assert counts(ours) == (1, {"torch.Tensor.detach used them": 1})


@pytest.mark.parametrize("name", ["Llama", "T5"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name, reentrant):
    theirs, inputs = build(name), batch(name)
    ours = copy.deepcopy(theirs)
    fused_ops.convert(ours, loss=F.cross_entropy)
    for model in (theirs, ours):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = [step(model, inputs, contextlib.nullcontext())[1] for model in (theirs, ours)]
    assert counts(ours) == (1, {})
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 7}
CLASSIFIERS = {
    "Llama": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(vocab_size=WORDS, pad_token_id=0, **SMALL)
    ),
    "BERT, tokens": lambda: transformers.BertForTokenClassification(
        transformers.BertConfig(vocab_size=WORDS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SMALL)
    ),
    "ViT": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=8, **SMALL)),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(name):
    torch.manual_seed(0)
    theirs = CLASSIFIERS[name]()
    ours = copy.deepcopy(theirs)
    fused_ops.convert(ours, loss=F.cross_entropy)
    labels = torch.randint(0, 7, (3, 9) if "tokens" in name else (3,))
    inputs = (
        {"pixel_values": torch.randn(3, 3, 16, 16)} if name == "ViT" else {"input_ids": batch("Llama")["input_ids"]}
    )
    found = [step(model, {**inputs, "labels": labels}, contextlib.nullcontext())[1] for model in (theirs, ours)]
    assert counts(ours) == (1, {})
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_generation_and_evaluation():
    """Without gradients it is the layer that it was."""
    theirs, inputs = build("Gemma 2").eval(), batch("Gemma 2")
    ours = copy.deepcopy(theirs)
    fused_ops.convert(ours, loss=F.cross_entropy)
    tokens = [m.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False) for m in (theirs, ours)]
    assert torch.equal(*tokens)
    with torch.no_grad():
        assert torch.equal(ours(**inputs).loss, theirs(**inputs).loss)
    assert counts(ours)[0] == 0 and set(counts(ours)[1]) == {"gradients were off"}


TRAINERS = {
    "plain": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "label smoothing, bf16": {"label_smoothing_factor": 0.1, "bf16": True},
    "accumulated, checkpointed": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("how", TRAINERS)
@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_trainer(name, how, tmp_path):
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs it: pip install accelerate")
    inputs, states = batch(name), []
    rows = [{key: t[i] for key, t in inputs.items()} for _ in range(4) for i in range(3)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=3, max_steps=2, report_to=[], use_cpu=True, seed=3,
        learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True,
        **TRAINERS[how],
    )  # fmt: skip
    for converted in (False, True):
        model = build(name)
        if converted:
            fused_ops.convert(model, loss=F.cross_entropy)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:3])
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
        states.append((torch.cat([p.detach().flatten() for p in model.parameters()]) - before, loss))
    steps = 2 * TRAINERS[how].get("gradient_accumulation_steps", 1)
    assert counts(model) == (steps, {"gradients were off": 1})
    (theirs, loss), (ours, our_loss) = states
    far = 1e-2 if TRAINERS[how].get("bf16") else 1e-4
    assert (ours - theirs).norm() <= far * theirs.norm() and abs(our_loss - loss) <= far


@pytest.mark.parametrize("how", ["plain", "dropout", "autocast", "whole", "two", "bfloat16"])
def test_peft(how):
    """LoRA on the head: the base and the low-rank term in one loss, unless peft keeps it in another dtype."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    found, inputs = [], batch("Llama")
    for converted in (False, True):
        model = build("Llama")
        if how == "bfloat16":
            model = model.bfloat16()
        targets = ["q_proj"] if how == "whole" else ["q_proj", "lm_head"]
        config = peft.LoraConfig(
            r=4, lora_alpha=8, lora_dropout=0.3 if how == "dropout" else 0.0, target_modules=targets,
            modules_to_save=["lm_head"] if how == "whole" else None,
        )  # fmt: skip
        torch.manual_seed(2)
        model = peft.get_peft_model(model, config)
        if how == "two":
            model.add_adapter("other", config)
            model.base_model.set_adapter(["default", "other"])
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
        if converted:
            fused_ops.convert(model, loss=F.cross_entropy)
        torch.manual_seed(3)  # of the dropout
        context = torch.autocast("cpu", torch.bfloat16) if how == "autocast" else contextlib.nullcontext()
        with context:
            loss = model(**inputs).loss
        wanted = [p for p in model.parameters() if p.requires_grad]
        found.append([loss.detach(), *torch.autograd.grad(loss, wanted)])
    far = 2e-2 if how in ("autocast", "bfloat16") else 1e-4
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert ours.dtype == theirs.dtype and (ours - theirs).norm() <= far * theirs.norm()
    assert counts(model)[0] == (how not in ("two", "bfloat16"))
    fused_ops.revert(model)
    assert not any("_fused_ops_record" in m.__dict__ for m in model.modules())
