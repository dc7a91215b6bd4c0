use super::AdapterBase;
use crate::testing::{adapter, copy_of, edit_tensors, golden, llama_sites, recorded};
use crate::{LoraConfig, MergeOptions, merge};
use ferrotune_core::Result;
use ferrotune_core::adapter::{Adapter, Site, SiteId};
use ferrotune_core::io::ModelFiles;
use ferrotune_core::model::WeightSource;
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder};
use ferrotune_kernels::{DType, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

const EMBEDDING: &str = "base_model.model.model.embed_tokens.weight";
const HEAD: &str = "base_model.model.lm_head.weight";

type Values = (Vec<usize>, Vec<f32>);

fn base() -> ModelFiles {
    ModelFiles::open(golden("_bases/llama")).expect("fixture")
}

/// The base's table, with another first value.
fn table(name: &str, first: Option<f32>) -> Values {
    let mut values = base().read_f32(name).expect("fixture");
    values[0] = first.unwrap_or(values[0]);
    (base().meta(name).expect("fixture").shape.clone(), values)
}

/// A recorded adapter that holds `more`.
fn with(more: &[(&str, Values)]) -> tempfile::TempDir {
    let copy = copy_of("lora_qv");
    edit_tensors(copy.path(), |tensors| {
        let more = more.iter();
        tensors.extend(more.map(|(name, values)| ((*name).to_owned(), values.clone())));
    });
    copy
}

fn tables(directory: &Path, sites: &[Site]) -> Result<BTreeMap<String, Vec<f32>>> {
    let (_, params) = recorded("lora_qv");
    let files = base();
    let base = AdapterBase::new(&files, directory, sites, params.layout())?;
    Ok(base.tables().clone())
}

#[test]
fn tables_that_are_those_of_the_base_change_nothing() {
    let (adapter, mut params) = recorded("lora_qv");
    let copy = with(&[
        (EMBEDDING, table("model.embed_tokens.weight", None)),
        (HEAD, table("lm_head.weight", None)),
    ]);
    adapter.load(&mut params, copy.path()).expect("PEFT's file");
    assert!(
        tables(copy.path(), &llama_sites(2))
            .expect("read")
            .is_empty()
    );
}

/// As PEFT, which reads them into the base.
#[test]
fn tables_of_another_base_take_the_place_of_its_own() {
    let copy = with(&[(EMBEDDING, table("model.embed_tokens.weight", Some(7.0)))]);
    let (_, params) = recorded("lora_qv");
    let files = base();
    let base = AdapterBase::new(&files, copy.path(), &llama_sites(2), params.layout());
    let base = base.expect("read");
    let read = |name: &str| {
        let [rows, cols] = files.meta(name).expect("fixture").shape[..] else {
            panic!("a matrix")
        };
        let mut values = Tensor::zeros(DType::F32, rows, cols);
        base.read(name, values.view_mut()).expect("read");
        values.to_f32_vec()
    };
    let (_, own) = table("model.embed_tokens.weight", Some(7.0));
    assert_eq!(read("model.embed_tokens.weight"), own);
    assert_eq!(read("lm_head.weight"), table("lm_head.weight", None).1);
    let root = tempfile::tempdir().expect("temporary directory");
    let output = root.path().join("merged");
    merge(
        &golden("_bases/llama"),
        copy.path(),
        &output,
        &MergeOptions::default(),
    )
    .expect("merges");
    let merged = ModelFiles::open(&output).expect("merged");
    assert_eq!(
        merged.read_f32("model.embed_tokens.weight").expect("there"),
        own
    );
}

#[test]
fn what_cannot_be_the_bases_is_refused_with_what_is_wrong() {
    let mut tied = llama_sites(2);
    tied.last_mut().expect("a head").tied_to = Some(SiteId(0));
    let rows = |more: usize| (vec![256 + more, 32], vec![0.5; (256 + more) * 32]);
    let nowhere = "base_model.model.model.encoder.embed_tokens.weight";
    for (more, sites, parts) in [
        (
            vec![(EMBEDDING, rows(8))],
            llama_sites(2),
            &["has 264 rows", "has 256", "resize_token_embeddings(264)"][..],
        ),
        (
            vec![(EMBEDDING, (vec![256, 16], vec![0.5; 256 * 16]))],
            llama_sites(2),
            &["[256, 16]", "[256, 32]"],
        ),
        (
            vec![(nowhere, rows(0))],
            llama_sites(2),
            &["encoder.embed_tokens", "of no module", "did you mean"],
        ),
        (
            vec![
                (EMBEDDING, table("model.embed_tokens.weight", Some(7.0))),
                (HEAD, table("model.embed_tokens.weight", Some(8.0))),
            ],
            tied,
            &["differ", "one weight for both", "tie_word_embeddings"],
        ),
    ] {
        let copy = with(&more);
        let error = tables(copy.path(), &sites)
            .expect_err("refused")
            .to_string();
        for part in parts
            .iter()
            .chain(&["adapter_model.safetensors", "base_model.model."])
        {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
}

/// PEFT saves what is around a table with it, and nothing around another.
#[test]
fn only_what_peft_saves_is_taken_for_a_copy() {
    let (updates, mut params) = recorded("lora_qv");
    let trained = LoraConfig {
        modules_to_save: vec!["lm_head".into()],
        ..updates.config().clone()
    };
    let head = |middle: &str| format!("base_model.model.lm_head{middle}.weight");
    for middle in [
        ".base_layer",
        ".original_module",
        ".modules_to_save",
        ".token_adapter.base_layer",
    ] {
        let copy = with(&[(&head(middle), table("lm_head.weight", None))]);
        let error = updates.load(&mut params, copy.path());
        let error = error.expect_err(middle).to_string();
        assert!(
            error.contains("no place in this model"),
            "{middle}: {error}"
        );
    }
    let mut layout = ParamLayoutBuilder::new();
    let whole = adapter(trained);
    whole
        .attach(&llama_sites(2), &mut layout)
        .expect("attaches");
    let layout = layout.build().expect("unique names");
    let mut params = FlatBuffer::zeros(&layout);
    let own = table("lm_head.weight", Some(3.0));
    let (original, repeated) = (head(".original_module"), head(".modules_to_save"));
    let copy = with(&[
        (HEAD, own.clone()),
        (&original, table("lm_head.weight", None)),
        (&repeated, own),
    ]);
    whole.load(&mut params, copy.path()).expect("PEFT's file");
    let files = base();
    let base = AdapterBase::new(&files, copy.path(), &llama_sites(2), &layout).expect("read");
    assert!(base.tables().is_empty(), "what is trained is no copy");
}
