//! A GGUF file as a base.

use super::formats::assert_as_if_dense;
use super::*;
use candle_core::quantized::gguf_file::{self, Value as Key};
use candle_core::quantized::{GgmlDType, QTensor};

type Candle = candle_core::Tensor;
/// Shapes and values by name.
type Weights = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn shape(columns: usize) -> Shape {
    Shape {
        hidden: columns,
        intermediate: columns,
        head_dim: columns / 4,
        layers: 1,
        ..Shape::default()
    }
}

/// llama.cpp's names of a model of one layer.
fn own_name(name: &str) -> String {
    let pairs = [
        ("model.embed_tokens.", "token_embd."),
        ("model.norm.", "output_norm."),
        ("lm_head.", "output."),
        ("model.layers.0.input_layernorm.", "blk.0.attn_norm."),
        (
            "model.layers.0.post_attention_layernorm.",
            "blk.0.ffn_norm.",
        ),
        ("model.layers.0.self_attn.q_proj.", "blk.0.attn_q."),
        ("model.layers.0.self_attn.k_proj.", "blk.0.attn_k."),
        ("model.layers.0.self_attn.v_proj.", "blk.0.attn_v."),
        ("model.layers.0.self_attn.o_proj.", "blk.0.attn_output."),
        ("model.layers.0.mlp.gate_proj.", "blk.0.ffn_gate."),
        ("model.layers.0.mlp.up_proj.", "blk.0.ffn_up."),
        ("model.layers.0.mlp.down_proj.", "blk.0.ffn_down."),
    ];
    let found = pairs
        .iter()
        .find_map(|(from, to)| Some(format!("{to}{}", name.strip_prefix(from)?)));
    found.unwrap_or_else(|| panic!("no name for {name}"))
}

/// The rows of q and k: halves of heads side by side, or interleaved as in llama.cpp.
fn reordered(values: &Candle, heads: usize, interleave: bool) -> candle_core::Result<Candle> {
    let (rows, cols) = values.dims2()?;
    let half = rows / heads / 2;
    let dims = if interleave {
        (heads, 2, half, cols)
    } else {
        (heads, half, 2, cols)
    };
    values
        .reshape(dims)?
        .transpose(1, 2)?
        .contiguous()?
        .reshape((rows, cols))
}

/// Writes `model.gguf` with matrices of `kind`, and returns the values of the model it holds.
fn write_gguf(directory: &Path, shape: &Shape, kind: GgmlDType) -> candle_core::Result<Weights> {
    let cpu = candle_core::Device::Cpu;
    let heads = |name: &str| match name {
        _ if name.contains("q_proj") => Some(shape.heads),
        _ if name.contains("k_proj") => Some(shape.kv_heads),
        _ => None,
    };
    let (mut tensors, mut values) = (Vec::new(), BTreeMap::new());
    for (name, (dims, weights)) in shape.weights(SEED) {
        let mut tensor = Candle::from_vec(weights, dims.as_slice(), &cpu)?;
        if let Some(heads) = heads(&name) {
            tensor = reordered(&tensor, heads, true)?;
        }
        let kind = if dims.len() == 2 {
            kind
        } else {
            GgmlDType::F32
        };
        let quantised = QTensor::quantize(&tensor, kind)?;
        let mut held = quantised.dequantize(&cpu)?;
        if let Some(heads) = heads(&name) {
            held = reordered(&held, heads, false)?;
        }
        values.insert(name.clone(), (dims, held.flatten_all()?.to_vec1()?));
        tensors.push((own_name(&name), quantised));
    }
    let number = |value: usize| Key::U32(value as u32);
    let keys = [
        ("general.architecture", Key::String("llama".into())),
        ("llama.embedding_length", number(shape.hidden)),
        ("llama.feed_forward_length", number(shape.intermediate)),
        ("llama.block_count", number(shape.layers)),
        ("llama.attention.head_count", number(shape.heads)),
        ("llama.attention.head_count_kv", number(shape.kv_heads)),
        ("llama.attention.layer_norm_rms_epsilon", Key::F32(1e-5)),
        ("llama.rope.freq_base", Key::F32(10_000.0)),
        ("llama.context_length", number(shape.max_position)),
        (
            "tokenizer.ggml.tokens",
            Key::Array(vec![Key::String("a".into()); 3]),
        ),
    ];
    let keys: Vec<(&str, &Key)> = keys.iter().map(|(name, value)| (*name, value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    std::fs::create_dir_all(directory)?;
    let mut file = std::fs::File::create(directory.join("model.gguf"))?;
    gguf_file::write(&mut file, &keys, &tensors)?;
    Ok(values)
}

/// A workbench whose base is a GGUF file and a tokenizer.
pub(super) fn bench() -> Workbench {
    let shape = Shape {
        intermediate: 64,
        ..Shape::default()
    };
    let shape = Shape { layers: 1, ..shape };
    let bench = Workbench::of(&shape, 4);
    for file in ["config.json", "model.safetensors"] {
        std::fs::remove_file(bench.path("base").join(file)).expect("there");
    }
    write_gguf(&bench.path("base"), &shape, GgmlDType::Q8_0).expect("writable");
    bench
}

#[test]
fn a_file_computes_as_its_values_do() {
    let directory = tempfile::tempdir().expect("temporary directory");
    for (kind, columns) in [
        (GgmlDType::Q4_0, 64),
        (GgmlDType::Q8_0, 64),
        (GgmlDType::Q4K, 256),
        (GgmlDType::Q6K, 256),
    ] {
        let shape = shape(columns);
        let [codes, dense] =
            ["codes", "dense"].map(|d| directory.path().join(format!("{d}{kind:?}")));
        let values = write_gguf(&codes, &shape, kind).expect("writable");
        write_model(&dense, &shape, Stored::F32, SEED);
        write_weights(&dense.join("model.safetensors"), values.iter(), Stored::F32);
        assert_as_if_dense(&codes, &dense, &format!("{kind:?}"));
    }
}

#[test]
fn a_run_over_a_file_says_what_it_is_and_is_not_merged() {
    let bench = bench();
    bench.train("out", &json!({"device": "cpu"})).expect(0);
    assert!(eval_loss(&bench, &[]).is_finite());
    let inspected = ferrotune(&["inspect", "model", text(&bench.path("base"))]).expect(0);
    assert!(
        inspected.stdout.contains("linears in q8_0"),
        "{}",
        inspected.stdout
    );
    said(&merge(&bench).expect(BAD_INPUT), &["config.json"]);
    assert!(!bench.path("merged").exists());
    let refused = bench.train("full", &json!({"use_peft": false}));
    said(&refused.expect(BAD_CONFIG), &["use_peft", "q8_0"]);
}

#[test]
fn a_file_that_is_not_sound_is_refused() {
    let bench = bench();
    let path = bench.path("base/model.gguf");
    let sound = std::fs::read(&path).expect("there");
    let said_of = |bytes: &[u8]| {
        std::fs::write(&path, bytes).expect("writable");
        let opened = ModelFiles::open(bench.path("base"));
        opened.expect_err("refused").to_string()
    };
    let with_bytes = |at: usize, bytes: &[u8]| {
        let mut changed = sound.clone();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        said_of(&changed)
    };
    let after = |text: &str| {
        let found = sound.windows(text.len()).position(|w| w == text.as_bytes());
        found.expect("there") + text.len()
    };
    let tensor = after("blk.0.attn_v.weight");
    for (message, part) in [
        (with_bytes(0, b"XXXX"), "no GGUF file"),
        (with_bytes(4, &[9]), "version 9"),
        (said_of(&sound[..40]), "more than there are"),
        (said_of(&sound[..20]), "cut off"),
        (said_of(&sound[..sound.len() - 64]), "cut off"),
        // A text that claims to be longer than the file, and so many tensors.
        (with_bytes(24, &[0xff; 8]), "more than there are"),
        (with_bytes(8, &[0xff; 8]), "there are"),
        // Dimensions, columns, type of a tensor.
        (with_bytes(tensor, &[9]), "9 dimensions"),
        (with_bytes(tensor + 4, &[0xff; 8]), "shape"),
        (with_bytes(tensor + 20, &[3]), "ggml type 3"),
        (
            with_bytes(after("general.architecture") + 12, b"gamma"),
            "gamma",
        ),
    ] {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
    std::fs::write(&path, &sound).expect("writable");
    std::fs::copy(&path, bench.path("base/other.gguf")).expect("writable");
    let several = ModelFiles::open(bench.path("base")).expect_err("refused");
    assert!(several.to_string().contains("other.gguf"));
}
