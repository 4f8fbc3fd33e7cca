"""Our modules compute what the library's do: losses and gradients, whatever the lengths."""

from collections.abc import Callable, Sequence

import pytest
import torch
from llmservices.trainer import architectures
from llmservices.trainer.documents import lay_out
from llmservices.trainer.foreign import Foreign
from llmservices.trainer.learner import Learner, MicroBatch
from llmservices.trainer.linears import accelerate
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 100
LENGTHS = ([7], [5, 9, 9, 30], [16, 16, 16, 16], [3, 4, 5, 6, 30, 31, 32, 33, 50, 2], [150, 9])


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
    )


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
        )
    )


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        bos_token_id=0,
        eos_token_id=1,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def bert(labels: int = 3) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = labels
    return BertForSequenceClassification(config)


def ours(library: PreTrainedModel, labels: int = 0) -> Learner:
    config = library.config.to_dict() | {"architectures": [type(library).__name__]}
    learner = architectures.own(config, labels=labels)
    assert learner is not None
    learner.load_exported(dict(library.named_parameters()))
    accelerate(learner)
    return learner


def padded(sequences: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)
    return ids, mask


def draw(lengths: Sequence[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    """Under the library's names and layouts."""
    with torch.no_grad():
        for parameter in learner.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    return learner.exported()


def next_tokens(sequences: Sequence[torch.Tensor]) -> MicroBatch:
    documents = lay_out(sequences)
    starts = documents.firsts_S.tolist()
    places = [
        start + at for start, length in zip(starts, documents.lengths) for at in range(length - 1)
    ]
    targets = torch.cat([sequences[index][1:] for index in documents.order])
    return MicroBatch(documents, torch.tensor(places), targets, documents.tokens)


@pytest.mark.parametrize("make", [llama, qwen2, gpt2])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_generators(make: Callable[[], PreTrainedModel], lengths: list[int]) -> None:
    torch.manual_seed(0)
    library = make()
    learner = ours(library)
    sequences = draw(lengths)
    ids, mask = padded(sequences)
    expected = library(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    torch.autograd.backward(expected.loss)
    batch = next_tokens(sequences)
    loss = learner.loss(batch) / batch.count
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    found = gradients(learner)
    for name, parameter in library.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_classifier(lengths: list[int]) -> None:
    torch.manual_seed(0)
    library = bert()
    learner = ours(library, labels=3)
    sequences = draw(lengths)
    ids, mask = padded(sequences)
    classes = torch.arange(len(lengths)) % 3
    expected = library(input_ids=ids, attention_mask=mask, labels=classes)
    torch.autograd.backward(expected.loss)
    documents = lay_out(sequences)
    batch = MicroBatch(documents, None, classes[documents.order], documents.tokens)
    loss = learner.loss(batch) / batch.count
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    found = gradients(learner)
    for name, parameter in library.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, atol=2e-6, rtol=1e-4)


def test_token_types() -> None:
    torch.manual_seed(0)
    library = bert()
    learner = ours(library, labels=3)
    sequences = draw([9, 5])
    types = [torch.tensor([0] * 4 + [1] * 5), torch.tensor([0, 0, 1, 1, 1])]
    ids, mask = padded(sequences)
    types_BT, _ = padded(types)
    documents = lay_out(sequences, types)
    expected = library(input_ids=ids, attention_mask=mask, token_type_ids=types_BT).logits
    torch.testing.assert_close(
        learner.judge(documents), expected[documents.order], atol=1e-5, rtol=1e-5
    )


def test_the_library_for_anything_else() -> None:
    torch.manual_seed(0)
    library = llama()
    config = library.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    foreign = Foreign(config, task="generate", labels=0)
    foreign.load_exported(dict(library.named_parameters()))
    batch = next_tokens(draw([5, 9, 9, 30]))
    expected = ours(library).loss(batch)
    assert foreign.loss(batch).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        {"hidden_act": "gelu"},
        {"model_type": "gemma"},
    ],
)
def test_what_is_not_ours(change: dict[str, object]) -> None:
    assert architectures.own(llama().config.to_dict() | change, labels=0) is None


def test_activation_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    library = llama()
    batch = next_tokens(draw([5, 9, 9, 30]))
    found = []
    for checkpointed in (False, True):
        learner = ours(library)
        learner.is_checkpointed = checkpointed
        torch.autograd.backward(learner.loss(batch))
        found.append(gradients(learner))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
