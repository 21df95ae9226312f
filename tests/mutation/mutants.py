"""The seeded faults: (file, exact text that stands there once, what it becomes, the tests that should notice, name)."""

from pathlib import Path
from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    suite: str
    name: str


CE, ROWS, BN = (
    "fused_ops/reference/cross_entropy.py",
    "fused_ops/reference/_cross_entropy_rows.py",
    "fused_ops/reference/batch_norm.py",
)
OPTIONS, CHUNKS = "fused_ops/_cross_entropy_options.py", "fused_ops/_linear_cross_entropy_chunks.py"
PLAIN, HEAD, NORM = (
    "fused_ops/_cross_entropy_plain.py",
    "fused_ops/_linear_cross_entropy_functions.py",
    "fused_ops/batch_norm.py",
)

PYTHON = [
    Mutant(CE, "loss = loss / total", "loss = loss / (total + 1)", "ce", "mean over one row too many"),
    Mutant(CE, "-torch.ones_like(p)", "-2 * torch.ones_like(p)", "ce", "target's 1 twice"),
    Mutant(CE, "p = p / p.sum(dim, keepdim=True)  #", "p = p / 1  #", "ce", "p not normalised beside a large lse"),
    Mutant(CE, "lse = torch.where(valid, lse, 0.0)", "lse = lse + 0", "ce", "lse of ignored rows kept"),
    Mutant(
        CE,
        "return p * (v - (p * v).sum(dim, keepdim=True))",
        "return p * (v + (p * v).sum(dim, keepdim=True))",
        "ce",
        "sign in the softmax's Jacobian",
    ),
    Mutant(
        CE,
        "_reduce((residual * v).sum(dim), total, reduction)",
        "_reduce((p * v).sum(dim), total, reduction)",
        "ce",
        "second derivative without the target",
    ),
    Mutant(
        CE, "if limits.min <= ignore_index <= limits.max:", "if True:", "ce", "ignore_index wrapped into a narrow dtype"
    ),
    Mutant(
        CE,
        "grad_loss / total.to(grad_loss.dtype) if reduction == MEAN",
        "grad_loss * 1 if reduction == MEAN",
        "ce",
        "mean's 1/n missing",
    ),
    Mutant(
        CE,
        "return p, torch.where(keep, p - one_hot, 0.0), valid",
        "return p, p - one_hot, valid",
        "ce",
        "tangent of ignored rows",
    ),
    Mutant(CE, "rows = (residual * input_t", "rows = (2 * residual * input_t", "ce", "tangent doubled"),
    Mutant(
        ROWS,
        "return torch.where(off | ~self.valid.unsqueeze(self.dim), 0.0, q * values).sum(self.dim)",
        "return (q * values).sum(self.dim)",
        "ce",
        "0 times the -inf of a masked class",
    ),
    Mutant(ROWS, "o.logit_scale * (1 - t * t)", "o.logit_scale * (1 - t)", "ce", "slope of softcap"),
    Mutant(
        ROWS,
        "* p * (log_p + entropy)\n    if g.target",
        "* p * (log_p - entropy)\n    if g.target",
        "ce",
        "sign in the entropy's gradient",
    ),
    Mutant(
        ROWS,
        "values = -(1 - o.label_smoothing) * row.log_p_allowed * each",
        "values = -row.log_p_allowed * each",
        "ce",
        "smoothing missing in the gradient of probabilities",
    ),
    Mutant(
        ROWS,
        "log_p_t = u_t - lse_t.unsqueeze(dim)",
        "log_p_t = u_t + lse_t.unsqueeze(dim)",
        "ce",
        "sign in the tangent",
    ),
    Mutant(ROWS, "quiet = quiet & (grad == 0)", "quiet = quiet & True", "ce", "lse of an ignored row has no gradient"),
    Mutant(
        ROWS,
        "mass = mass if probabilities is not None else mass - (1 - o.label_smoothing) * target_weight",
        "mass = mass",
        "ce",
        "mass with the index' own share",
    ),
    Mutant(
        ROWS,
        "spread = self.allowed.to(dense.dtype) / self.allowed.sum(self.dim, keepdim=True).clamp(min=1)",
        "spread = self.allowed.to(dense.dtype) / self.u.size(self.dim)",
        "ce",
        "smoothing over masked classes",
    ),
    Mutant(
        BN,
        "self.count, self.degrees = count, count - options.correction",
        "self.count, self.degrees = count, count",
        "bn",
        "correction dropped",
    ),
    Mutant(BN, "(-self.invstd / self.degrees)", "(self.invstd / self.degrees)", "bn", "sign of the second derivative"),
    Mutant(BN, "u = u - self.sum(u) / self.count - self.xhat", "u = u - self.xhat", "bn", "mean of the gradient kept"),
    Mutant(BN, "+ self.spread(bias_t)\n", "+ 0 * self.spread(bias_t)\n", "bn", "bias has no tangent"),
    Mutant(
        BN,
        "state.scaled(state.quadratic(h, v) + state.linear(bend))",
        "state.scaled(state.quadratic(h, v))",
        "bn",
        "activation'' missing in the second derivative",
    ),
    Mutant(
        BN,
        "state.sum(h * state.linear(v) + bend * state.xhat)",
        "state.sum(h * state.linear(v))",
        "bn",
        "activation'' missing for the weight",
    ),
    Mutant(
        BN,
        "new[1] = momentum * (m2 / (n - 1) if n > 1 else m2 / 0)",
        "new[1] = momentum * (m2 / n if n > 1 else m2 / 0)",
        "bn",
        "n/(n-1) missing in the reference",
    ),
    Mutant(
        BN,
        "centered * (dot * inv.square() / (n - correction))",
        "centered * (dot * inv / (n - correction))",
        "bn",
        "invstd once instead of squared",
    ),
    Mutant(
        OPTIONS,
        "z_rows = call.z_loss * (lse if counted is None else torch.where(counted, lse, 0.0)).square()",
        "z_rows = call.z_loss * (lse if counted is None else torch.where(counted, lse, 0.0))",
        "ce",
        "z-loss without its square",
    ),
    Mutant(
        OPTIONS,
        "        rows = rows * call.token_weight.double()\n    return fixed_order_sum(rows)",
        "        rows = rows * 1\n    return fixed_order_sum(rows)",
        "ce",
        "token weights missing in the denominator",
    ),
    Mutant(OPTIONS, "torch.stack((lam, 1 - lam), dim)", "torch.stack((lam, lam), dim)", "ce", "mixup's second share"),
    Mutant(
        OPTIONS,
        "return torch.where(nothing, 0.0, total / torch.where(nothing, 1.0, denominator))",
        "return total / denominator",
        "ce",
        'empty="zero" gives NaN',
    ),
    Mutant(
        OPTIONS,
        "smoothing = float(given.label_smoothing) if given.label_smoothing > 0 else 0.0",
        "smoothing = float(given.label_smoothing)",
        "ce",
        "negative smoothing",
    ),
    Mutant(PLAIN, "    increment_version(input)\n", "", "ce", "in place without a new version"),
    Mutant(
        PLAIN,
        "if torch.is_grad_enabled() or _transforms_active():",
        "if _transforms_active():",
        "ce",
        "no second derivative",
    ),
    Mutant(
        PLAIN,
        "ctx.mark_non_differentiable(lse, total)",
        "ctx.mark_non_differentiable(lse)",
        "ce",
        "the count is differentiable",
    ),
    Mutant(
        CHUNKS,
        "[slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]",
        "[slice(begin, min(begin + step, rows)) for begin in range(0, rows - 1, step)]",
        "lce",
        "the last chunk of one row",
    ),
    Mutant(
        HEAD,
        "found[i] = (gradients[i] * grad_loss).to(gradients[i].dtype)",
        "found[i] = gradients[i]",
        "lce",
        "upstream gradient ignored",
    ),
    Mutant(HEAD, "                ctx.gradients = None\n", "", "lce", "gradients handed over twice"),
    Mutant(
        HEAD,
        "terms = nll if ctx.z_loss == 0 else nll + ctx.z_loss * torch.where(row_scale == 0, 0.0, lse).square()",
        "terms = nll",
        "lce",
        "z-loss has no second derivative",
    ),
    Mutant(
        HEAD,
        "found[i] = value if before is None else before + value",
        "found[i] = value",
        "lce",
        "second derivative of one chunk only",
    ),
    Mutant(
        "fused_ops/_linear_cross_entropy_checks.py",
        "torch.cat((wide[..., 1:], torch.full_like(wide[..., :1], ignored)), -1)",
        "torch.cat((torch.full_like(wide[..., :1], ignored), wide[..., :-1]), -1)",
        "lce",
        "shift the other way",
    ),
    Mutant(
        NORM,
        "        running_var.copy_(new_var)\n",
        "        running_var.copy_(new_mean)\n",
        "bn",
        "running_var gets the mean",
    ),
    Mutant(
        NORM,
        "running_var is not None and not recomputing():",
        "running_var is not None:",
        "bn",
        "checkpointing counts twice",
    ),
    Mutant(
        NORM, "found[1] = grad_output\n", "found[1] = grad_output * 2\n", "bn", "gradient of a plain residual doubled"
    ),
    Mutant(
        BN, "mask = pack(~(z <= 0), input)", "mask = pack(z > 1, input)", "bn", "wrong signs in the reference's mask"
    ),
    Mutant(
        CHUNKS,
        "torch.mm(left, right, out=total) if first else total.addmm_(left, right)",
        "torch.mm(left, right, out=total)",
        "lce",
        "only the last chunk's weight gradient",
    ),
]

NCPU, NBACK, NWALK, NACT, MOM = (
    f"csrc/cpu/{n}"
    for n in ("batch_norm.cpp", "batch_norm_backward.cpp", "batch_norm_walk.h", "activation.h", "moments.h")
)
CCPU, CWALK, CLANES, CTARGET, CROWS, CROWSBACK, CSUMS, CTILE, COPTLANES, CLIN, SIMD, VECTOR = (
    f"csrc/cpu/{n}"
    for n in (
        "cross_entropy.cpp",
        "cross_entropy_walks.h",
        "cross_entropy_lanes.h",
        "cross_entropy_targets.h",
        "cross_entropy_rows.cpp",
        "cross_entropy_rows_backward.cpp",
        "cross_entropy_sums.h",
        "cross_entropy_tile.h",
        "cross_entropy_option_lanes.h",
        "linear_cross_entropy.cpp",
        "simd.h",
        "vector.h",
    )
)
NBIND, CBIND = "csrc/batch_norm.cpp", "csrc/cross_entropy.cpp"

NATIVE = [
    Mutant(
        MOM,
        "m2 += other_m2 + delta * delta *",
        "m2 += other_m2 + 0 * delta * delta *",
        "bn",
        "Chan's cross term missing",
    ),
    Mutant(
        MOM,
        "double mean = 0, m2 = 0;\n  int64_t n = 0;",
        "float mean = 0, m2 = 0;\n  int64_t n = 0;",
        "bn",
        "moments merged in float",
    ),
    Mutant(
        MOM,
        "for (; i + 8 <= n; i += 8) step(g + i, x + i, s0, d0);",
        "for (; i + 8 < n; i += 8) step(g + i, x + i, s0, d0);",
        "equivalent",
        "the last eight one by one (equivalent)",
    ),
    Mutant(
        NCPU,
        "if (!l.valid[position + i]) y[i] = T{};",
        "if (!l.valid[i]) y[i] = T{};",
        "bn",
        "validity of another position",
    ),
    Mutant(
        NCPU,
        "a.mask + row * row_bytes + position % l.spatial / 8",
        "a.mask + row * row_bytes",
        "bn",
        "mask of a plane's second run",
    ),
    Mutant(
        NWALK,
        "row_end = std::min(row_begin + l.rows_per_item(), l.batch);",
        "row_end = std::min(row_begin + l.rows_per_item(), l.batch - 1);",
        "bn",
        "last row of a tile",
    ),
    Mutant(
        NWALK,
        "n = std::min(l.tile_columns(), l.channels - column);",
        "n = std::min(l.tile_columns(), l.channels);",
        "bn",
        "last tile as wide as the first",
    ),
    Mutant(
        NWALK,
        "for (int64_t i = 0; i < n; ++i) values[i] += values[k * n + i];",
        "for (int64_t i = 0; i + 1 < n; ++i) values[i] += values[k * n + i];",
        "bn",
        "repetitions of the last channel",
    ),
    Mutant(
        NWALK,
        "return (row_ * layout_.channels + channel_) * layout_.spatial + start_;",
        "return (row_ * layout_.channels + channel_) * layout_.spatial;",
        "bn",
        "every run the first",
    ),
    Mutant(NACT, "return s * (A(1) + z * (A(1) - s));", "return s * (A(1) + z * s);", "bn", "silu'"),
    Mutant(
        NACT,
        "return z < A(-3) ? A(0) : z <= A(3) ? z / A(3) + A(0.5) : A(1);",
        "return z < A(-3) ? A(0) : z <= A(3) ? z / A(3) : A(1);",
        "bn",
        "hardswish'",
    ),
    Mutant(
        NBIND,
        "running[2 * c + 1] = o.momentum * (p.b / (n - 1))",
        "running[2 * c + 1] = o.momentum * (p.b / n)",
        "bn",
        "n/(n-1) missing in running_var",
    ),
    Mutant(
        NBIND,
        "std::sqrt(p.b / (n - static_cast<double>(o.correction)) + o.eps) : nan",
        "std::sqrt(p.b / n + o.eps) : nan",
        "bn",
        "correction dropped",
    ),
    Mutant(
        NBIND,
        "running[2 * c] = o.momentum * p.a + (1 - o.momentum) * running[2 * c];",
        "running[2 * c] = (1 - o.momentum) * p.a + o.momentum * running[2 * c];",
        "bn",
        "momentum the other way round",
    ),
    Mutant(
        NBIND,
        "const double slope = p.b * inv[c] * inv[c] / (n",
        "const double slope = p.b * inv[c] / (n",
        "bn",
        "invstd once instead of squared",
    ),
    Mutant(
        NBIND,
        "if (p.n) params[2 * c] += p.b * inv[c], params[2 * c + 1] += p.a;",
        "if (p.n) params[2 * c] = p.b * inv[c], params[2 * c + 1] = p.a;",
        "bn",
        "parameters' gradients of the last ghost batch only",
    ),
    Mutant(
        NBIND,
        "coefficients.set(part, 3, c, p.a / n - low * slope);",
        "coefficients.set(part, 3, c, p.a / n);",
        "bn",
        "what rounding the mean loses, in the gradient",
    ),
    Mutant(
        "csrc/batch_norm_tensors.h",
        "set(view, 2, channel, bias - lost_of(mean) * scale);",
        "set(view, 2, channel, bias);",
        "bn",
        "what rounding the mean loses",
    ),
    Mutant(
        "csrc/batch_norm_tensors.h",
        "return rows_before(group) * (layout.columns() ? 1 : layout.channels);",
        "return rows_before(group);",
        "bn",
        "mask of the second ghost batch",
    ),
    Mutant(
        CCPU,
        "static_cast<const T*>(a.grad_loss)[row + r]",
        "static_cast<const T*>(a.grad_loss)[row]",
        "ce",
        "upstream gradient of the step's first row",
    ),
    Mutant(
        CCPU,
        "if (targets.target[r] == kIgnored) a.lse[row + r] = loss[r] = 0;",
        "if (targets.target[r] == kIgnored) a.lse[row + r] = 0;",
        "ce",
        "loss of ignored rows",
    ),
    Mutant(
        CCPU,
        "store(grad + c * g.class_stride, acc_t<T>(0));",
        "store(grad + c, acc_t<T>(0));",
        "ce",
        "wrong stride of zeros",
    ),
    Mutant(CWALK, "(others[r] - 1.0) + target);", "others[r] + target);", "ce", "the maximum's 1 counted twice"),
    Mutant(
        CWALK,
        "(exp_(max - chunk_max));\n      max = chunk_max;\n    }\n    const float shift",
        "(1);\n      max = chunk_max;\n    }\n    const float shift",
        "ce",
        "chunks not rescaled",
    ),
    Mutant(
        CWALK,
        "const float_vec p = exp_vec((v - high) - low);",
        "const float_vec p = exp_vec(v - high);",
        "ce",
        "low part of lse dropped",
    ),
    Mutant(
        CWALK,
        "if (i < n) s[1] += term(load_tail(x + i, n - i, -std::numeric_limits<float>::infinity()));",
        "if (i + 1 < n) s[1] += term(load_tail(x + i, n - i, -std::numeric_limits<float>::infinity()));",
        "ce",
        "a tail of one",
    ),
    Mutant(
        CWALK,
        "if (i < n) m[1] = max_vec(load_tail(x + i, n - i, -std::numeric_limits<float>::infinity()), m[1]);",
        "",
        "ce",
        "maximum of the tail",
    ),
    Mutant(
        CWALK,
        "static_cast<double>(sum_exp(v + t + 1, n - t - 1, max))",
        "static_cast<double>(sum_exp(v + t, n - t, max))",
        "ce",
        "target counted among the others",
    ),
    Mutant(
        CLANES,
        "row[k].wanted == static_cast<int32_t>(kIgnored) ? float_vec{} : g);",
        "g);",
        "ce",
        "NaN of an ignored row in the gradient",
    ),
    Mutant(CWALK, "low = static_cast<A>(std::log(sum));", "low = 0;", "ce", "equal maxima at 1e30"),
    Mutant(
        CLANES,
        "const float_vec shift = max == kNone ? float_vec{} : max;",
        "const float_vec shift = float_vec{};",
        "ce",
        "maximum not taken off, among adjacent rows",
    ),
    Mutant(
        CLANES,
        "others.low *= factor.low, others.high *= factor.high;",
        "others.low *= factor.low;",
        "ce",
        "a register's second half at a larger maximum",
    ),
    Mutant(
        COPTLANES,
        "f == 0.0 ? double_vec{} : f * (w + fall * sum);",
        "f == 0.0 ? double_vec{} : f * w;",
        "ce",
        "entropy over several passes of adjacent rows",
    ),
    Mutant(
        CTARGET,
        "first_ = row / step_ * step_ * a.per_row + row % step_;",
        "first_ = row * a.per_row;",
        "ce",
        "indices of spatial rows",
    ),
    Mutant(
        CTARGET,
        "bad_ |= t < 0 || t >= a.layout.classes;",
        "bad_ = t < 0 || t >= a.layout.classes;",
        "ce",
        "only the last index is checked",
    ),
    Mutant(
        CTARGET,
        "return static_cast<const int16_t*>(t.data)[row];",
        "return static_cast<const uint16_t*>(t.data)[row];",
        "ce",
        "int16 indices without a sign",
    ),
    Mutant(
        CSUMS,
        "if (kEntropy) weighted = shrink == 0 ? 0 : shrink * (weighted + fall * others);",
        "if (kEntropy) weighted = shrink * weighted;",
        "ce",
        "entropy over several chunks",
    ),
    Mutant(
        CROWS,
        "share = soft * weight;",
        "share = weight;",
        "ce",
        "the index' share under smoothing",
    ),
    Mutant(CTILE, "grad[i] *= scale * (1 - t * t);", "grad[i] *= scale * (1 + t * t);", "ce", "slope of softcap"),
    Mutant(
        CROWS,
        "if (share != 0) *nll += share * (log_sum + away);",
        "*nll += share * (log_sum + away);",
        "ce",
        "0 times the loss of a logit of -inf",
    ),
    Mutant(
        CSUMS,
        "prediction = c + first_of(u, n, chunk_max);",
        "prediction = first_of(u, n, chunk_max);",
        "ce",
        "prediction in a later chunk",
    ),
    Mutant(
        CTILE, "allowed_[r] += m[c * l.class_stride] != 0;", "allowed_[r] += 1;", "ce", "smoothing over masked classes"
    ),
    Mutant(
        CROWS,
        "if (!target.one()) *mass += share;",
        "if (!target.one()) *mass += weight;",
        "ce",
        "mass without smoothing",
    ),
    Mutant(
        CROWSBACK,
        "scale[r] = args.grad_nll[row + r] * weight_of_row(a, row + r);",
        "scale[r] = args.grad_nll[row + r] * weight_of_row(a, row);",
        "ce",
        "class weight of another row",
    ),
    Mutant(
        CROWSBACK,
        "h != 0 ? args.entropy[row] : 0",
        "0",
        "ce",
        "entropy's gradient",
    ),
    Mutant(
        CTILE,
        "if (a_.has_dense && a_.label_smoothing != 0)\n      for",
        "if (false)\n      for",
        "ce",
        "probabilities not smoothed",
    ),
    Mutant(
        CLIN,
        "2 * args.z_loss * args.forward.lse[r] * args.row_scale[r]",
        "args.z_loss * args.forward.lse[r] * args.row_scale[r]",
        "lce",
        "the 2 of the z-loss' gradient",
    ),
    Mutant(CLIN, "args.row_scale[r] == 0 ? 0 : ", "", "lce", "z-loss of rows without a weight"),
    Mutant(CLIN, "n = std::min(step, end - row);", "n = step;", "lce", "a step beyond the last row"),
    Mutant(SIMD, "poly = poly * r + 1.6666667e-1f;", "poly = poly * r + 1.6667667e-1f;", "ce", "a coefficient of exp"),
    Mutant(
        SIMD,
        "const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;",
        "const uint32_t rounded = u >> 16;",
        "ce",
        "bfloat16 truncated",
    ),
    Mutant(
        SIMD,
        "for (int64_t l = 0; i + l < n; ++l) lanes[l] += exp_(x[i + l] - shift);",
        "for (int64_t l = 0; i + l + 1 < n; ++l) lanes[l] += exp_(x[i + l] - shift);",
        "ce",
        "tail of the sum of exponentials",
    ),
    Mutant(
        VECTOR,
        "    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), bit_copy<__m512>(v));",
        "    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((2u << n) - 1u), bit_copy<__m512>(v));",
        "guard",
        "one element too many written",
    ),
    Mutant(
        VECTOR,
        "const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1u);",
        "const __mmask16 mask = static_cast<__mmask16>((2u << n) - 1u);",
        "guard",
        "one element too many read",
    ),
    Mutant(
        CBIND,
        "if (mode == Reduction::mean) write_scalar(loss, sum / static_cast<double>(count));",
        "if (mode == Reduction::mean) write_scalar(loss, sum / static_cast<double>(layout.rows()));",
        "ce",
        "mean over ignored rows too",
    ),
    Mutant(
        CBIND,
        "if (mode == Reduction::mean) scale /= scalar_value(total);",
        "if (mode == Reduction::mean) scale /= static_cast<double>(input.size(0));",
        "ce",
        "mean's gradient over all rows",
    ),
    Mutant(
        "csrc/cross_entropy_tensors.h",
        "l.spatial_stride = t.stride(t.dim() - 1);",
        "l.spatial_stride = 1;",
        "ce",
        "spatial stride taken for 1",
    ),
    Mutant(
        "csrc/cross_entropy_tensors.h",
        "if (stride < reach) return false;",
        "if (stride < 0) return false;",
        "ce",
        "in place on logits that share memory",
    ),
    Mutant(
        "csrc/cpu/batch_norm_moments.cpp",
        "cross = static_cast<double>(done) * n / total, inverse",
        "cross = 0, inverse",
        "bn",
        "merge of blocks of rows",
    ),
    Mutant(
        "csrc/cpu/batch_norm_moments.cpp",
        "squares[i] - sums[i] * sums[i] * inverse",
        "squares[i] - sums[i] * inverse",
        "bn",
        "deviation from the pilot not squared",
    ),
    Mutant(
        "csrc/cpu/batch_norm_moments.cpp",
        "if (l.valid && !l.valid[r]) return;",
        "if (l.valid && !l.valid[r] && r) return;",
        "bn",
        "a padded first row counted",
    ),
    Mutant(
        MOM,
        "low += (v[0] + v[1]) + (v[2] + v[3]);",
        "low += (v[0] + v[1]) + v[2];",
        "bn",
        "one of four accumulators dropped",
    ),
    Mutant(MOM, "padded_ += L::kSize - (n - i);", "padded_ += 0;", "bn", "padding of the tail counted"),
    Mutant(NCPU, "if constexpr (kResidual) shift += r.v[k];", "", "bn", "residual dropped"),
    Mutant(
        NCPU,
        "z.v[k] = (z.v[k] - c.mean.at(i)) * c.scale.at(i) + shift;",
        "z.v[k] = z.v[k] * c.scale.at(i) + (shift - c.mean.at(i) * c.scale.at(i));",
        "bn",
        "alpha x + beta instead of (x - mean) invstd",
    ),
    Mutant(
        "csrc/cpu/batch_norm_grads.h",
        "h.v[k] = z <= 0 ? V{} : h.v[k];",
        "h.v[k] = z < -1 ? V{} : h.v[k];",
        "bn",
        "relu' of another point",
    ),
    Mutant(
        "csrc/cpu/batch_norm_grads.h",
        "h.v[k] = z > 0 ? h.v[k] : h.v[k] * run.slope;",
        "h.v[k] = z > 0 ? h.v[k] : h.v[k] + run.slope;",
        "bn",
        "leaky_relu'",
    ),
    Mutant(
        "csrc/cpu/batch_norm_sums.cpp",
        "a.exact_mean[(t.column + i) / a.repeat]",
        "a.exact_mean[t.column / a.repeat]",
        "bn",
        "mean of the first channel",
    ),
    Mutant(
        "csrc/cpu/batch_norm_sums.cpp",
        "dot[i] - (exact_mean(i) - static_cast<double>(center[i])) * sum[i]",
        "dot[i]",
        "bn",
        "sums around the rounded mean",
    ),
    Mutant(
        NACT,
        "+ z * kInvSqrt2Pi<A> * exp_close(A(-0.5) * z * z);",
        "- z * kInvSqrt2Pi<A> * exp_close(A(-0.5) * z * z);",
        "bn",
        "gelu'",
    ),
    Mutant(NACT, "return A(2) * gap - gap * gap;", "return A(2) * gap;", "bn", "tanh'"),
    Mutant(
        NACT, "slope * exp_close(z > A(0) ? A(0) : z);", "exp_close(z > A(0) ? A(0) : z);", "bn", "elu' without alpha"
    ),
    Mutant(
        CCPU,
        "const bool ignored = target[r] == t.ignore_index;",
        "const bool ignored = target[r] == t.ignore_index && r;",
        "ce",
        "ignore_index dropped in the first row",
    ),
    Mutant(
        CCPU,
        "bad |= !ignored && (target[r] < 0 || target[r] >= classes);",
        "bad |= !ignored && (target[r] < 0 || target[r] > classes);",
        "ce",
        "target = classes accepted",
    ),
    Mutant(CWALK, "return p >= 0.5 ? -others : p - 1.0;", "return p - 1.0;", "ce", "p - 1 cancels"),
    Mutant(
        CROWSBACK,
        "residual = p >= 0.5 ? -others[r] : p - 1.0;",
        "residual = p - 1.0;",
        "ce",
        "p - 1 cancels, with options",
    ),
]

MUTANTS = PYTHON + [m for m in NATIVE if m.suite != "equivalent"]


def misplaced(tree: Path) -> list[str]:
    """What the list says that is no longer so, after a change of the sources."""
    wrong = []
    for m in MUTANTS:
        path = tree / m.file
        times = path.read_text().count(m.old) if path.exists() else 0
        if times != 1:
            wrong.append(f"{m.file}, {m.name}: found {times} times instead of once: {m.old!r}")
    return wrong
