"""The model is the NanoChat architecture to the last digit, causal, countable and trainable."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vibechat.engine import KVCache
from vibechat.gpt import GPT, GPTConfig
from vibechat.scaling import model_config

TINY = GPTConfig(sequence_len=32, vocab_size=61, n_layer=2, n_head=4, n_kv_head=4, n_embd=64)
GROUPED = dataclasses.replace(TINY, n_kv_head=2)


def random_model(config: GPTConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> GPT:
    """Every parameter random and of a size that matters, so that no term is hidden behind a zero."""
    torch.manual_seed(seed)
    model = GPT(config)
    model.init_weights()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=1.0 if "wte" in name else 0.3 / math.sqrt(p.size(-1) / 16))
    model.set_compute_dtype(dtype)
    return model.to(dtype)


def tokens(config: GPTConfig, batch: int = 2, length: int | None = None, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length or config.sequence_len), generator=generator)


# ---------------------------------------------------------------------------------------------------------------------
# the same function as transformers' NanoChat


@pytest.mark.parametrize("config", [TINY, GROUPED], ids=["mha", "gqa"])
def test_logits_are_those_of_transformers_nanochat(config: GPTConfig) -> None:
    from transformers import NanoChatConfig, NanoChatForCausalLM

    theirs = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=4 * config.n_embd,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head,
            max_position_embeddings=config.sequence_len,
            hidden_act="relu2",
            rms_norm_eps=2**-23,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            final_logit_softcapping=15.0,
            attention_bias=False,
            tie_word_embeddings=False,
            pad_token_id=0,
        )
    ).eval()
    ours = random_model(config)
    names = {
        "transformer.wte": "model.embed_tokens",
        "transformer.h": "model.layers",
        "attn.c_q": "self_attn.q_proj",
        "attn.c_k": "self_attn.k_proj",
        "attn.c_v": "self_attn.v_proj",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    weights = {}
    for name, weight in ours.state_dict().items():
        for mine, other in names.items():
            name = name.replace(mine, other)
        weights[name] = weight
    theirs.load_state_dict(weights, strict=True)  # every tensor of either has its counterpart
    idx = tokens(config)
    with torch.no_grad():
        difference = (ours(idx) - theirs(idx).logits).abs().max().item()
    assert difference <= 1e-5
    assert ours(idx).abs().max() > 3  # the softcap is felt


# ---------------------------------------------------------------------------------------------------------------------
# forward


def test_the_loss_is_the_cross_entropy_of_the_logits() -> None:
    model, idx = random_model(TINY), tokens(TINY)
    targets = tokens(TINY, seed=2)
    targets[0, :5] = -1
    expected = torch.nn.functional.cross_entropy(
        model(idx).view(-1, TINY.vocab_size), targets.view(-1), ignore_index=-1, reduction="none"
    ).view(targets.shape)
    each = model(idx, targets, loss_reduction="none")
    assert each.shape == targets.shape
    torch.testing.assert_close(each, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(idx, targets, loss_reduction="sum"), expected.sum(), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(model(idx, targets), expected.sum() / (targets >= 0).sum(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [TINY, GROUPED], ids=["mha", "gqa"])
def test_no_position_sees_its_future(config: GPTConfig) -> None:
    model, idx = random_model(config), tokens(config, batch=1)
    with torch.no_grad():
        logits = model(idx)
        for cut in (1, 7, 31):
            changed = idx.clone()
            changed[:, cut:] = (changed[:, cut:] + 1) % config.vocab_size
            other = model(changed)
            torch.testing.assert_close(other[:, :cut], logits[:, :cut], atol=1e-5, rtol=1e-5)
            assert (other[:, cut] - logits[:, cut]).abs().max() > 1e-2  # and the present is seen


@pytest.mark.parametrize("config", [TINY, GROUPED], ids=["mha", "gqa"])
@pytest.mark.parametrize("chunks", [(32,), (1,) * 32, (10, 1, 5, 16)], ids=["prefill", "decode", "mixed"])
def test_a_cache_changes_nothing(config: GPTConfig, chunks: tuple[int, ...]) -> None:
    model, idx = random_model(config), tokens(config)
    cache = KVCache(2, config.n_kv_head, config.sequence_len, config.head_dim, config.n_layer)
    with torch.no_grad():
        pieces = [model(piece, kv_cache=cache) for piece in idx.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(idx), atol=1e-5, rtol=1e-5)
    assert cache.get_pos() == config.sequence_len


def test_positions_past_the_context_are_refused() -> None:
    model = random_model(TINY)
    with pytest.raises(ValueError, match="33 positions do not fit sequence_len=32"):
        model(tokens(TINY, length=33))


def test_the_first_loss_is_that_of_guessing() -> None:
    model = GPT(TINY)
    model.init_weights()
    assert model(tokens(TINY), tokens(TINY, seed=2)).item() == pytest.approx(math.log(TINY.vocab_size), rel=1e-3)


def test_weights_initialize_on_the_device_a_meta_model_is_brought_to() -> None:
    with torch.device("meta"):
        model = GPT(TINY)
    model.to_empty(device="cpu")
    torch.manual_seed(7)
    model.init_weights()
    torch.manual_seed(7)
    other = GPT(TINY)
    torch.manual_seed(7)
    other.init_weights()
    idx = tokens(TINY)
    assert torch.equal(model(idx), other(idx))


# ---------------------------------------------------------------------------------------------------------------------
# gradients and training


def test_gradients_of_the_whole_model_in_float64() -> None:
    config = GPTConfig(sequence_len=5, vocab_size=11, n_layer=2, n_head=2, n_kv_head=1, n_embd=8)
    model = random_model(config, torch.float64)
    idx, targets = tokens(config), tokens(config, seed=2)
    targets[1, 2] = -1
    names = [name for name, _ in model.named_parameters()]

    def loss(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (idx, targets))

    parameters = tuple(p.detach().clone().requires_grad_() for p in model.parameters())
    assert torch.autograd.gradcheck(loss, parameters, fast_mode=True)


def test_one_batch_is_learned_by_heart() -> None:
    torch.manual_seed(0)
    model = GPT(TINY)
    model.init_weights()
    model.set_compute_dtype(torch.float32)
    optimizers = model.setup_optimizers()
    idx, targets = tokens(TINY), tokens(TINY, seed=2)
    for _ in range(60):
        loss = model(idx, targets)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    assert model(idx, targets).item() < 0.01


def test_gradient_accumulation_equals_the_large_batch() -> None:
    model, idx, targets = random_model(TINY), tokens(TINY, batch=6), tokens(TINY, batch=6, seed=2)
    targets[0, 3:] = -1  # micro-batches of unequal weight
    count = (targets >= 0).sum()

    def gradients(sizes: list[int]) -> list[Tensor]:
        model.zero_grad()
        for x, y in zip(idx.split(sizes), targets.split(sizes), strict=True):
            (model(x, y, loss_reduction="sum") / count).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for whole, parts in zip(gradients([6]), gradients([1, 2, 3]), strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_optimizers_own_every_parameter_once_with_the_rates_of_the_width() -> None:
    model = GPT(TINY)
    optimizers = model.setup_optimizers(unembedding_lr=0.1, embedding_lr=0.2, matrix_lr=0.3)
    owned = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(owned) == len({id(p) for p in owned}) == len(list(model.parameters()))
    scale = (64 / 768) ** -0.5
    rates = {id(p): group["lr"] for o in optimizers for group in o.param_groups for p in group["params"]}
    assert rates[id(model.lm_head.weight)] == pytest.approx(0.1 * scale)
    assert rates[id(model.transformer.wte.weight)] == pytest.approx(0.2 * scale)
    assert rates[id(next(model.blocks()).mlp.c_fc.weight)] == 0.3
    assert all(group["initial_lr"] == group["lr"] for o in optimizers for group in o.param_groups)
    muon = model.setup_optimizers(matrix_weight_decay=0.3, normuon=False)[1]
    assert all(group["weight_decay"] == 0.3 and not group["normuon"] for group in muon.param_groups)


def test_adamw_alone_owns_the_matrices_too() -> None:
    model = GPT(TINY)
    (adamw,) = model.setup_optimizers(matrix_lr=0.003, matrix_optimizer="adamw")
    owned = [p for group in adamw.param_groups for p in group["params"]]
    assert len(owned) == len({id(p) for p in owned}) == len(list(model.parameters()))
    rates = {id(p): group["lr"] for group in adamw.param_groups for p in group["params"]}
    assert rates[id(next(model.blocks()).mlp.c_fc.weight)] == 0.003
    with pytest.raises(ValueError, match="one of muon, adamw"):
        model.setup_optimizers(matrix_optimizer="sgd")


# ---------------------------------------------------------------------------------------------------------------------
# generation


def generated(model: GPT, seed: int, **kwargs: object) -> list[int]:
    return list(model.generate([1, 2, 3], 40, seed=seed, **kwargs))  # type: ignore[arg-type]  # past the context too


def test_generation_is_a_function_of_the_seed() -> None:
    model = random_model(TINY)
    assert generated(model, 1) == generated(model, 1)
    assert generated(model, 1) != generated(model, 2)
    assert len(generated(model, 1)) == 40


def test_temperature_zero_takes_the_most_likely_token() -> None:
    model = random_model(TINY)
    first = next(model.generate([1, 2, 3], 1, temperature=0))
    assert first == model(torch.tensor([[1, 2, 3]]))[0, -1].argmax().item()
    assert generated(model, 1, temperature=0) == generated(model, 2, temperature=0) == generated(model, 3, top_k=1)


def test_top_k_never_leaves_the_k_most_likely() -> None:
    model = random_model(TINY)
    allowed = set(model(torch.tensor([[5]]))[0, -1].topk(3).indices.tolist())
    drawn = {next(model.generate([5], 1, top_k=3, temperature=2.0, seed=seed)) for seed in range(60)}
    assert drawn == allowed


# ---------------------------------------------------------------------------------------------------------------------
# counting. Parameters 2 V C + 12 L C^2; FLOPs 6 (V C + 12 L C^2) + 12 L C T, by hand.

COUNTS = {  # depth, sequence, vocabulary -> parameters, FLOPs a token
    (4, 512, 8_192): (7_340_032, 37_748_736),
    (12, 2_048, 65_536): (185_597_952, 1_038_090_240),
    (20, 2_048, 65_536): (560_988_160, 3_491_758_080),
    (26, 2_048, 65_536): (1_081_999_360, 6_900_940_800),
}


@pytest.mark.parametrize(("depth", "length", "vocab"), COUNTS)
def test_parameters_and_flops_against_hand_computed_numbers(depth: int, length: int, vocab: int) -> None:
    parameters, flops = COUNTS[depth, length, vocab]
    with torch.device("meta"):
        model = GPT(model_config(depth, length, vocab))
    assert model.num_params() == parameters
    assert model.estimate_flops() == flops
    attention = 12 * depth * model.config.n_embd * length
    assert model.estimate_flops(causal=True) == flops - attention + attention * (length + 1) // (2 * length)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 5}, "n_embd=64 must give n_head=5"),
        ({"n_head": 64, "n_kv_head": 64}, "even size"),
        ({"n_kv_head": 3}, "multiple of n_kv_head=3"),
        ({"n_layer": 0}, "n_layer=0 must be at least 1"),
    ],
)
def test_a_shape_that_is_no_model_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


# ---------------------------------------------------------------------------------------------------------------------
# the cache


def filled(cache: KVCache, length: int, seed: int = 0) -> KVCache:
    torch.manual_seed(seed)
    for layer in range(cache.num_layers):
        shape = (cache.batch_size, cache.num_heads, length, cache.head_dim)
        cache.insert_kv(layer, torch.randn(shape), torch.randn(shape))
    return cache


def test_a_cache_returns_all_that_was_inserted_and_grows() -> None:
    cache = KVCache(2, 3, 200, 4, 2)
    rows = torch.randn(150, 2, 2, 2, 3, 1, 4)  # position, layer, k or v, then one insertion
    for position, layers in enumerate(rows):
        for layer, (k, v) in enumerate(layers):
            keys, values = cache.insert_kv(layer, k, v)
            expected = rows[: position + 1, layer].squeeze(-2).permute(1, 2, 3, 0, 4)  # k or v, B, H, T, D
            assert torch.equal(keys, expected[0])
            assert torch.equal(values, expected[1])
    assert cache.get_pos() == 150


def test_a_cache_is_reset_and_prefilled() -> None:
    one = filled(KVCache(1, 2, 16, 4, 2), 5)
    many = KVCache(3, 2, 8, 4, 2)
    many.prefill(one)
    assert many.get_pos() == 5
    more = torch.randn(3, 2, 1, 4)
    keys, _ = many.insert_kv(0, more, more)
    original, _ = one.insert_kv(0, more[:1], more[:1])
    assert torch.equal(keys[:, :, :5], original[:, :, :5].expand(3, -1, -1, -1))
    many.reset()
    assert many.get_pos() == 0


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: filled(KVCache(1, 2, 4, 4, 1), 5), "5 positions do not fit seq_len=4"),
        (lambda: KVCache(1, 2, 4, 4, 1).insert_kv(0, torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)), "must be"),
        (lambda: filled(KVCache(1, 2, 8, 4, 1), 2).prefill(filled(KVCache(1, 2, 8, 4, 1), 2)), "empty"),
        (lambda: KVCache(1, 2, 8, 4, 1).prefill(KVCache(1, 2, 8, 4, 1)), "empty"),
        (lambda: KVCache(1, 2, 8, 4, 1).prefill(filled(KVCache(1, 1, 8, 4, 1), 2)), "differ"),
        (lambda: KVCache(3, 2, 8, 4, 1).prefill(filled(KVCache(2, 2, 8, 4, 1), 2)), "do not fit"),
    ],
)
def test_what_a_cache_cannot_hold_is_refused(action: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        action()
