"""What frameworks wrap around a PyTorch model and put inside it: decoding, training and saving of such models."""

import copy
import subprocess
import sys

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.spec.params import parameter_table
from mamba_core.spec.tolerances import relative_l2

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, parametrize, prune  # noqa: E402

from mamba_core.backends.torch import foreign, loss_and_gradients  # noqa: E402

SIZES = {"d_model": 8, "n_layer": 2, "vocab_size": 24, "d_state": 3, "initializer_range": 0.3}
IDS = torch.randint(0, 24, (2, 9), generator=torch.Generator().manual_seed(0))
DATA = np.random.default_rng(0).integers(0, 5, 200) ** 2
SETTINGS = mc.TrainSettings(steps=3, batch_size=2, length=8, learning_rate=1e-2, warmup_steps=0)
TARGETS = ["in_proj", "x_proj", "dt_proj", "out_proj", "embeddings"]


def built(kind=mc.MambaConfig, dtype="float32", **settings):
    model = mc.build(kind(**SIZES | settings), backend="torch", device="cpu", dtype=dtype, seed=1)
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.dt_proj.bias += 3.0
            block.mixer.x_proj.weight *= 5.0
    return model


def adapted(config="LoraConfig", kind=mc.MambaConfig, dtype="float32", targets=TARGETS, **settings):
    peft = pytest.importorskip("peft")
    if config == "LoraConfig":
        settings = {"r": 4, "init_lora_weights": False} | settings
    else:
        targets, settings = [name for name in targets if name != "embeddings"], {"feedforward_modules": []}
    torch.manual_seed(0)
    model = peft.get_peft_model(built(kind, dtype), getattr(peft, config)(target_modules=targets, **settings))
    for parameter in model.parameters():
        if parameter.requires_grad and config == "IA3Config":
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def saved(model, folder, **settings):
    """The model that is loaded from what is saved."""
    mc.save(model, folder, **settings)
    return mc.load(folder, backend="torch", device="cpu")


def assert_saved(model, folder, limit=0.0, **settings):
    inner = mc.wrappers.unwrap(model, "the test")
    with torch.no_grad():
        assert relative_l2(saved(model, folder, **settings)(IDS).logits, inner(IDS).logits) <= limit


# --- adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [mc.MambaConfig, mc.MiniMambaConfig, mc.FalconMambaConfig])
@pytest.mark.parametrize("config", ["LoraConfig", "DoRA", "IA3Config"])
def test_adapters_act_on_every_path_and_are_merged(kind, config, tmp_path):
    """Against PEFT's own merged weights; without merging they are refused."""
    settings = {"use_dora": True} if config == "DoRA" else {}
    model = adapted("LoraConfig" if config == "DoRA" else config, kind, **settings)
    wanted, base = copy.deepcopy(model).merge_and_unload(), built(kind)
    positions = {"segment_ids": IDS // 6, "mask": IDS != 3}
    inner = model.get_base_model()
    with torch.no_grad():
        assert relative_l2(inner(IDS).logits, base(IDS).logits) > 1e-2
        assert relative_l2(inner(IDS).logits, wanted(IDS).logits) < 1e-5
        assert relative_l2(inner(IDS, **positions).logits, wanted(IDS, **positions).logits) < 1e-5
        found, expected = inner(IDS), wanted(IDS)
        for token in IDS.unbind(1):
            found, expected = inner(token[:, None], found.state), wanted(token[:, None], expected.state)
            assert relative_l2(found.logits, expected.logits) < 1e-5
    logprobs = [mc.generate(each, [[1, 2, 3]], max_new_tokens=4).logprobs for each in (model, wanted)]
    np.testing.assert_allclose(*logprobs, rtol=1e-4)
    model(IDS).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"in_proj \(.*merge"):
        mc.save(model, tmp_path / "unmerged")
    assert not (tmp_path / "unmerged").exists()
    assert_saved(model, tmp_path / "merged", 1e-4, merge=True)
    assert any(part.training for part in model.train().modules())


def test_adapters_of_bfloat16_are_merged(tmp_path):
    model = adapted(dtype="bfloat16", targets=["in_proj", "dt_proj", "out_proj"])
    assert saved(model, tmp_path / "merged", merge=True).dtype == "bfloat16"
    with torch.no_grad():
        wanted = model(IDS).logits
        assert relative_l2(built(dtype="bfloat16")(IDS).logits, wanted) > 0.1
        assert relative_l2(mc.load(tmp_path / "merged", backend="torch")(IDS).logits, wanted) < 5e-2


def test_an_adapter_of_the_convolution(tmp_path):
    """PEFT's mixes the channels, which no weight of the table does."""
    model = adapted(targets=["conv1d"], r=16)
    with torch.no_grad():
        whole, state, steps = model(IDS).logits, None, []
        for token in IDS.unbind(1):
            out = model(token[:, None], state)
            state = out.state
            steps.append(out.logits)
        assert relative_l2(torch.cat(steps, dim=1), whole) < 1e-5
        assert relative_l2(built()(IDS).logits, whole) > 1e-3
    (model(IDS).logits.square().sum()).backward()
    assert all(p.grad.norm() > 0 for name, p in model.named_parameters() if "lora_" in name)
    with pytest.raises(ValueError, match=r"conv1d does not compute what a weight \(16, 1, 4\) computes"):
        mc.save(model, tmp_path / "merged", merge=True)


def test_training_an_adapter_trains_it_and_only_it(tmp_path):
    model = adapted()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    history = mc.train(model, DATA, SETTINGS)
    assert all(entry["gradient_norm"] > 0 for entry in history)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) is ("lora_" not in name), name
    trainer = registry.get("torch").trainer(model.get_base_model(), SETTINGS)
    trainer.step(DATA[:18].reshape(2, 9))
    shapes = trainer.shapes()
    assert all("lora_" in name for name in shapes)
    state = trainer.state()
    assert set(state) == {"step", *(f"{moment}.{name}" for name in shapes for moment in "mv")}
    other = registry.get("torch").trainer(model.get_base_model(), SETTINGS)
    other.load_state(state)
    for name, value in other.state().items():
        np.testing.assert_array_equal(value, state[name])
    with pytest.raises(ValueError, match="merge them first"):
        mc.train(model, DATA, SETTINGS, checkpoint=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_trained():
    """What requires a gradient: nothing is refused, a part is a part, and what was added decays by its axes."""
    model = built()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        mc.train(model, DATA, SETTINGS)
    model.backbone.norm_f.requires_grad_(True)
    kept = model.backbone.layers[0].norm.weight.clone()
    mc.train(model, DATA, SETTINGS)
    assert torch.equal(model.backbone.layers[0].norm.weight, kept)
    model.value_head = nn.Linear(8, 3)
    trainer = registry.get("torch").trainer(model, SETTINGS)
    assert trainer.shapes() == {"backbone.norm_f.weight": (8,), "value_head.weight": (3, 8), "value_head.bias": (3,)}
    decays = {group["weight_decay"]: len(group["params"]) for group in trainer.optimizer.param_groups}
    assert decays == {SETTINGS.weight_decay: 1, 0.0: 2}
    trainer.step(DATA[:18].reshape(2, 9))
    assert not trainer.state()["m.value_head.weight"].any()
    half = built(dtype="bfloat16")
    half.value_head = nn.Linear(8, 3, dtype=torch.bfloat16)
    registry.get("torch").trainer(half, SETTINGS).step(DATA[:18].reshape(2, 9))
    with pytest.raises(ValueError, match=r"value_head\.weight, value_head\.bias"):
        loss_and_gradients(model, DATA[:18].reshape(2, 9))


def test_a_quantised_or_absent_model_is_not_trained():
    config = mc.MambaConfig(d_model=256, n_layer=1, vocab_size=24)
    quantized = registry.get("torch").quantize(mc.build(config, backend="torch", device="cpu"))
    with pytest.raises(ValueError, match="the model is quantised"):
        mc.train(quantized, DATA, SETTINGS)
    with pytest.raises(ValueError, match="on the device 'meta'"):
        mc.train(built().to("meta"), DATA, SETTINGS)


# --- what a model has beside its table -----------------------------------------------------------


def test_a_model_as_built_has_nothing_beside_its_table():
    for kind in (mc.MambaConfig, mc.MiniMambaConfig, mc.FalconMambaConfig):
        assert foreign(built(kind)) == mc.backend.Foreign()


def test_what_a_model_has_beside_its_table(tmp_path):
    model = built()
    mixer, other = (block.mixer for block in model.backbone.layers)
    model.value_head = nn.Linear(8, 1)
    model.register_buffer("kept", torch.zeros(2))
    model.register_buffer("passing", torch.zeros(2), persistent=False)
    mixer.in_proj = nn.Sequential(mixer.in_proj)
    mixer.out_proj = nn.Linear(16, 8)
    prune.identity(mixer.x_proj, "weight")
    parametrizations.weight_norm(other.dt_proj)
    torch.nn.utils.weight_norm(other.x_proj)
    other.conv1d = nn.Conv1d(16, 16, 4, padding=3)
    other.in_proj.register_forward_hook(lambda *_: None)
    other.out_proj.forward = lambda x, forward=other.out_proj.forward: forward(x)
    model.backbone.layers[1].norm = nn.RMSNorm(8)
    model.backbone.norm_f.eps = 1.0
    found, here = foreign(model), "backbone.layers.{}.mixer.{}"
    assert found.names == ("value_head.weight", "value_head.bias", "kept")
    assert found.changed == {
        here.format(0, "in_proj"): "torch.nn.modules.container.Sequential",
        here.format(0, "x_proj"): "torch.nn.modules.linear.Linear without weight of the same shape",
        here.format(0, "out_proj"): "torch.nn.modules.linear.Linear with bias",
        "backbone.layers.1.norm": "torch.nn.modules.normalization.RMSNorm",
        here.format(1, "conv1d"): "torch.nn.modules.conv.Conv1d without weight of the same shape",
        here.format(1, "x_proj"): "torch.nn.modules.linear.Linear without weight of the same shape",
        here.format(1, "dt_proj"): "torch.nn.utils.parametrize.ParametrizedStepProjection",
        "backbone.norm_f": "mamba_core.backends.torch.blocks.RMSNorm with eps=1.0",
    }
    assert found.hooked == {here.format(1, "in_proj"): "with hooks", here.format(1, "out_proj"): "patched"}
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.in_proj \(\S*Sequential\), .*and 8 more"):
        mc.save(model, tmp_path / "model")
    with pytest.raises(ValueError, match=r"has value_head\.weight, value_head\.bias, kept, which cannot be merged"):
        mc.save(model, tmp_path / "model", merge=True)


def test_added_heads_are_refused_either_way(tmp_path):
    model = built()
    model.lm_head = nn.Linear(8, 24, bias=False)
    for merge in (False, True):
        with pytest.raises(ValueError, match=r"lm_head\.weight"):
            mc.save(model, tmp_path / "model", merge=merge)
    # The same tensor computes what the tied model does.
    model.lm_head.weight = model.backbone.embeddings.weight
    assert_saved(model, tmp_path / "model")


@pytest.mark.parametrize("kind", [mc.MambaConfig, mc.FalconMambaConfig])
def test_changed_layers_are_merged(kind, tmp_path):
    """weight_norm of both sorts, prune, parametrisations, wrappers, the framework's norm, hooks."""
    model = built(kind)
    first, second = model.backbone.layers
    torch.nn.utils.weight_norm(first.mixer.in_proj)
    parametrizations.weight_norm(first.mixer.conv1d)
    prune.l1_unstructured(first.mixer.x_proj, "weight", amount=0.5)
    parametrizations.spectral_norm(first.mixer.out_proj)
    first.norm = nn.RMSNorm(8, eps=first.norm.eps)
    with torch.no_grad():
        first.norm.weight *= 1.5
    second.mixer.in_proj.register_forward_hook(lambda module, given, out: 1.5 * out)
    second.mixer.dt_proj = nn.Sequential(second.mixer.dt_proj)
    second.mixer.conv1d = nn.Sequential(nn.ConstantPad1d((3, 0), 0.0), copy.deepcopy(second.mixer.conv1d))
    second.mixer.conv1d[1].padding = (0,)
    model.backbone.embeddings = nn.Sequential(model.backbone.embeddings)
    model.eval()
    assert_saved(model, tmp_path / "model", 1e-4, merge=True)
    second.norm = nn.LayerNorm(8)
    with pytest.raises(ValueError, match=r"layers\.1\.norm (does not compute|adds a bias)"):
        mc.save(model, tmp_path / "other", merge=True)


def test_a_parametrised_mixer_is_refused(tmp_path):
    model = built()
    parametrize.register_parametrization(model.backbone.layers[0].mixer, "A_log", nn.Identity())
    for merge in (False, True):
        with pytest.raises(ValueError, match=r"layers\.0\.mixer \(\S*ParametrizedMambaMixer\)"):
            mc.save(model, tmp_path / "model", merge=merge)


def test_a_model_of_float64_is_not_saved(tmp_path):
    model = built().double()
    values = dict(registry.get("torch").parameters(model))
    assert {value.dtype.name for value in values.values()} == {"float64"}
    for use in (
        lambda: mc.save(model, tmp_path / "model"),
        lambda: mc.train(model, DATA, SETTINGS, checkpoint=tmp_path / "model"),
    ):
        with pytest.raises(ValueError, match="the model is float64, and a checkpoint holds float32 at most"):
            use()
    assert not (tmp_path / "model").exists()


# --- wrappers ------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["compile", "average", "ddp", "data parallel"])
def test_wrappers(kind, tmp_path, process_group):
    """A training step, generation, and the model that is saved and loaded."""
    model = built()
    wrapped = {
        "compile": lambda: torch.compile(model, backend="eager"),
        "average": lambda: torch.optim.swa_utils.AveragedModel(model),
        "ddp": lambda: nn.parallel.DistributedDataParallel(model),
        "data parallel": lambda: nn.DataParallel(model),
    }[kind]()
    if kind == "average":
        model.backbone.norm_f.weight.data *= 2
        wrapped.update_parameters(model)
    else:
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
        wrapped(IDS).logits.square().mean().backward()
        optimizer.step()
    inner = mc.wrappers.unwrap(wrapped, "the test")
    found, wanted = (mc.generate(each, [[1, 2]], max_new_tokens=3) for each in (wrapped, inner))
    assert found.tokens == wanted.tokens
    assert relative_l2(built()(IDS).logits.detach(), inner(IDS).logits.detach()) > 1e-3
    assert_saved(wrapped, tmp_path / "model")
    if kind == "ddp":
        with pytest.raises(TypeError, match=r"train runs in one process; give it model\.module"):
            mc.train(wrapped, DATA, SETTINGS)
    else:
        assert mc.train(wrapped, DATA, SETTINGS)[-1]["gradient_norm"] > 0


@pytest.mark.parametrize("kind", [mc.MambaConfig, mc.MiniMambaConfig, mc.FalconMambaConfig])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_models(kind, dtype, where, tmp_path):
    """All parameters are on "meta" between calls, and hooks bring them."""
    accelerate = pytest.importorskip("accelerate")
    model, wanted = built(kind, dtype), built(kind, dtype)
    if where == "cpu":
        accelerate.cpu_offload(model, "cpu")
    else:
        parts = {"backbone.embeddings": "disk", "backbone.layers.0": "cpu", "backbone.layers.1": "disk"}
        parts |= {"backbone.norm_f": "cpu"} | ({} if model.lm_head is None else {"lm_head": "disk"})
        model = accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=tmp_path / "offloaded")
    assert any(parameter.is_meta for parameter in model.parameters())
    assert (model.device, model.dtype) == ("cpu", dtype)
    assert model.init_state(1).segment.device.type == "cpu"
    limit = 1e-5 if dtype == "float32" else 5e-2
    with torch.no_grad():
        assert relative_l2(model(IDS).logits, wanted(IDS).logits) < limit
        states = [each(IDS).state for each in (model, wanted)]
        found, expected = (each(IDS[:, :1], state).logits for each, state in zip((model, wanted), states, strict=True))
        assert relative_l2(found, expected) < limit
    logprobs = [mc.generate(each, [[1, 2, 3]], max_new_tokens=3).logprobs for each in (model, wanted)]
    np.testing.assert_allclose(*logprobs, rtol=1e-3 if dtype == "float32" else 0.1)
    with torch.no_grad():
        assert relative_l2(saved(model, tmp_path / "model")(IDS).logits, wanted(IDS).logits) == 0
        assert relative_l2(saved(model, tmp_path / "merged", merge=True)(IDS).logits, wanted(IDS).logits) < limit
    with pytest.raises(ValueError, match="on the device 'meta'"):
        mc.train(model, DATA, SETTINGS)


SHARDED = """
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mamba_core as mc

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
ids = torch.arange(18).reshape(2, 9)


def built(tied):
    config = mc.MambaConfig(d_model=8, n_layer=2, vocab_size=24, d_state=3, tie_embeddings=tied)
    return mc.build(config, backend="torch", device="cpu", seed=1)


for tied in (True, False):
    model, plain = built(tied), built(tied)
    # The whole model is one piece, or each block is one too.
    for part in (*(model.backbone.layers if tied else ()), model):
        fully_shard(part, mesh=mesh)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (model, plain)]
    found, wanted = (mc.generate(each, [[1, 2, 3]], max_new_tokens=3) for each in (model, plain))
    assert found.tokens == wanted.tokens
    settings = mc.TrainSettings(length=8)
    for use in (lambda: mc.save(model, f"{folder}/no"), lambda: mc.train(model, np.arange(99) % 24, settings)):
        try:
            use()
        except ValueError as fault:
            assert "get_model_state_dict" in str(fault), fault
            print(fault)
        else:
            raise AssertionError("a sharded model was taken")
    for each, optimizer in zip((model, plain), optimizers):
        each(ids).logits.square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        whole = built(tied)
        whole.load_state_dict(gathered)
        mc.save(whole, f"{folder}/{tied}")
        loaded = mc.load(f"{folder}/{tied}", backend="torch")
        torch.testing.assert_close(loaded(ids).logits, plain(ids).logits)
dist.destroy_process_group()
print("done")
"""


def test_models_sharded_over_two_processes(tmp_path):
    commands = [[sys.executable, "-c", SHARDED, str(rank), str(tmp_path)] for rank in range(2)]
    running = [subprocess.Popen(command, stdout=-1, stderr=subprocess.STDOUT, text=True) for command in commands]
    try:
        for process in running:
            output, _ = process.communicate(timeout=90)
            assert process.returncode == 0, output[-3000:]
            assert output.strip().endswith("done")
    finally:
        for process in running:
            process.kill()


# --- trainers of others --------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = torch.arange(index, index + 9) % 24
        return {"input_ids": row, "labels": row}


def error(logits, labels):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_a_training_step_of_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator, model = accelerate.Accelerator(cpu=True), built()
    before = model(IDS).logits.detach()
    prepared = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), 1e-2), torch.utils.data.DataLoader(Rows(), batch_size=4)
    )
    wrapped, optimizer, loader = prepared
    for rows in loader:
        optimizer.zero_grad()
        accelerator.backward(error(wrapped(rows["input_ids"]).logits, rows["labels"]))
        optimizer.step()
    assert relative_l2(before, model(IDS).logits.detach()) > 1e-2
    mc.generate(wrapped, [[1, 2]], max_new_tokens=2)
    assert_saved(wrapped, tmp_path / "model")


class WithLoss(nn.Module):
    """A model as users wrap it for Hugging Face's Trainer, which writes into the config of a model that has one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels=None):
        logits = self.model(input_ids).logits
        return {"loss": error(logits, labels), "logits": logits}


@pytest.mark.parametrize("tied", [False, True])
def test_the_trainer_of_hugging_face(tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = built(tie_embeddings=tied)
    before = model(IDS).logits.detach()
    settings = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [], "use_cpu": True}
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=2, save_steps=2, disable_tqdm=True, logging_steps=1, **settings
    )
    trainer = transformers.Trainer(model=WithLoss(model), args=arguments, train_dataset=Rows())
    assert trainer.train().training_loss > 0
    assert relative_l2(before, model(IDS).logits.detach()) > 1e-2
    assert_saved(model, tmp_path / "model")
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    assert set(parameter_table(model.config)) == {name for name, _ in model.named_parameters()}
