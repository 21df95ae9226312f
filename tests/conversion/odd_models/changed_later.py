"""What is done to a model after it was converted: edited, copied, cast, loaded, averaged."""

import copy
import io
import pickle

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from odd_models.case import Net, Sequence, case, images, layers


def _edit(name, change, build=Sequence, **options):
    """A case of one change to a model, which returns None or the model to go on with."""

    def built():
        return build()

    built.__name__ = name
    case(built, after=change, **options)


def _in_place(change):
    def after(model):
        change(model)

    return after


class _Forward(Net):
    def forward(self, x):
        y = self.stem(x)
        return self.relu(self.bn2(self.conv2(self.relu(self.bn(y)))) + y)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _delete(model):
    del model.net[2]


def _insert(model):
    model.net.insert(2, nn.Tanh())


def _replace(index, module):
    def change(model):
        model.net[index] = module()

    return change


def _set(path, name, value):
    def change(model):
        setattr(model.get_submodule(path), name, value)

    return change


def _load(model):
    state = {k: v + 0.25 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, strict=True)


def _assign(model):
    state = {k: v.clone() + 0.25 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, strict=True, assign=True)


def _reset(model):
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def _averaged(model):
    average = AveragedModel(model)
    average.update_parameters(model)
    return average


def _recalibrated(model):
    parameter = next(model.parameters())
    loader = [images()[0].to(parameter.dtype) for _ in range(3)]
    model.train()
    update_bn(loader, model)


def _wider(model):
    model.net[4] = nn.BatchNorm2d(4, momentum=0.5).to(model.net[3].weight.dtype)


def _frozen(model):
    model.requires_grad_(False)


def _swap_conv(model):
    model.net[0] = nn.Identity()
    model.net[3] = nn.Conv2d(3, 4, 3, bias=False).to(model.net[4].weight.dtype)
    model.net[1] = nn.Identity()


def _buffers(model):
    for buffer in model.buffers():
        buffer.add_(1)


def _deleted_attribute(model):
    model.net[1].register_parameter("bias", None)


for _name, _build in (("Sequential", Sequence), ("Forward", _Forward)):
    _edit(f"Copied{_name}", copy.deepcopy, _build)
    _edit(f"Pickled{_name}", _pickled, _build)
    _edit(f"StateLoaded{_name}", _load, _build)
    _edit(f"StateAssigned{_name}", _assign, _build)
    _edit(f"Frozen{_name}", _frozen, _build)
    _edit(f"Reset{_name}", _reset, _build)
    _edit(f"Averaged{_name}", _averaged, _build)
    _edit(f"Recalibrated{_name}", _recalibrated, _build)
    _edit(f"BuffersChanged{_name}", _buffers, _build)
    _edit(f"ChannelsLast{_name}", _in_place(lambda model: model.to(memory_format=torch.channels_last)), _build)
    _edit(f"ToDouble{_name}", _in_place(lambda model: model.double()), _build, modes=("float64",))
    _edit(f"ToFloat{_name}", _in_place(lambda model: model.float()), _build, modes=("train", "eval"))

_edit("SavedSequential", _saved)
_edit("Appended", _in_place(lambda model: model.net.append(nn.Tanh())))
_edit("Extended", _in_place(lambda model: model.net.extend([nn.Conv2d(4, 4, 1), nn.Tanh()])), modes=("train", "eval"))
_edit("Inserted", _insert)
_edit("Deleted", _delete)
_edit("SlicedLater", _in_place(lambda model: setattr(model, "net", model.net[:5])))
_edit("SlicedInTheMiddle", _in_place(lambda model: setattr(model, "net", model.net[:2] + model.net[3:])))
_edit("ActivationReplaced", _replace(2, nn.GELU))
_edit("ActivationReplacedByIdentity", _replace(2, nn.Identity))
_edit("ActivationReplacedBySameKind", _replace(2, nn.ReLU))
_edit("NormReplacedByIdentity", _replace(1, nn.Identity))
_edit("NormReplacedByNorm", _wider)
_edit("ModulesReplaced", _swap_conv)
_edit("BiasRemoved", _deleted_attribute)
_edit("InPlaceSwitchedOn", _set("net.2", "inplace", True))
_edit("MomentumChanged", _set("net.1", "momentum", 0.9))
_edit("MomentumRemoved", _set("net.1", "momentum", None))
_edit("EpsChanged", _set("net.1", "eps", 0.5))
_edit("TrackingSwitchedOff", _set("net.1", "track_running_stats", False))
_edit("NewWeight", _in_place(lambda m: setattr(m.net[1], "weight", nn.Parameter(m.net[1].weight.detach() * 2))))
_edit("NegativeSlopeChanged", _set("net.2", "negative_slope", 0.7), lambda: Sequence(*layers(nn.LeakyReLU())))
_edit("AlphaChanged", _set("net.2", "alpha", 0.3), lambda: Sequence(*layers(nn.ELU())))
_edit("ClassChanged", _set("net.2", "__class__", nn.Tanh))
_edit("ForwardPatchedLater", _set("net.2", "forward", torch.tanh))
_edit("NormsForwardPatchedLater", _set("net.1", "forward", torch.tanh))
_edit("SequentialsForwardPatchedLater", _set("net", "forward", torch.tanh))
_edit("ForwardSetLater", _set("", "forward", torch.tanh), _Forward)
_edit("ActivationOfForwardReplaced", _set("", "relu", nn.GELU()), _Forward)
_edit("NormOfForwardReplaced", _set("", "bn2", nn.Identity()), _Forward)
_edit("NormOfForwardFrozen", _in_place(lambda model: model.bn2.eval().requires_grad_(False)), _Forward)


def _to_bfloat16(model):
    model.bfloat16()
    model.register_forward_pre_hook(lambda m, args: (args[0].bfloat16(),))


def _to_half(model):
    model.half()
    model.register_forward_pre_hook(lambda m, args: (args[0].half(),))


for _name, _build in (("Sequential", Sequence), ("Forward", _Forward)):
    _edit(f"ToBfloat16{_name}", _to_bfloat16, _build, rounds=torch.bfloat16, modes=("train", "eval"))
    _edit(f"ToHalf{_name}", _to_half, _build, rounds=torch.float16, modes=("train", "eval"))


def _functional(model):
    """Called with other weights from outside."""
    state = {name: p.detach() * 2 for name, p in model.named_parameters()}
    return _Functional(model, state)


class _Functional(nn.Module):
    def __init__(self, model, state):
        super().__init__()
        self.model, self._state = model, state

    def forward(self, x):
        return torch.func.functional_call(self.model, self._state, (x,))


_edit("FunctionalCallLater", _functional)
_edit("WrappedLater", lambda model: nn.Sequential(model, nn.Tanh()))
_edit("PartTakenOut", lambda model: model.net[:2])
_edit("NormTakenOut", lambda model: nn.Sequential(model.net[0], model.net[1]))
_edit("ActivationTakenOut", lambda model: nn.Sequential(model.net[0], model.net[2], model.net[1]))
