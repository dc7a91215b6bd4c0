//! Classifiers of sequences: the head over the base, and the classes of rows.

use ferrotune_core::config::TrainConfig;
use ferrotune_core::data::Classes;
use ferrotune_core::model::{Classifier, DecoderConfig, HfConfig};
use ferrotune_core::{Error, Result};
use std::path::Path;

/// The model in `base` for the task of the run: a language model gets a new head where classes are to be learned.
///
/// # Errors
/// [`Error::Model`] as [`DecoderConfig::open`]; [`Error::Config`] if task, number of classes and base contradict each
/// other.
pub(super) fn decoder(config: &TrainConfig, base: &Path) -> Result<DecoderConfig> {
    let keys = HfConfig::open(base)?;
    let decoder = DecoderConfig::from_hf(&keys)?;
    let asked = config.model.num_labels;
    match (config.lora.classifies(), decoder.classifier) {
        (false, None) => Ok(decoder),
        (false, Some(Classifier { classes, .. })) => {
            let message = format!(
                "is {}, and {} is a classifier of {classes} classes; set lora_task_type: SEQ_CLS, or give a language \
                 model",
                config.lora.lora_task_type,
                base.display()
            );
            Err(Error::config("lora_task_type", message))
        }
        (true, Some(Classifier { classes, .. })) => match asked {
            Some(asked) if asked != classes => {
                let message = format!(
                    "is {asked}, and {} is a classifier of {classes} classes; leave it out",
                    base.display()
                );
                Err(Error::config("num_labels", message))
            }
            _ => Ok(decoder),
        },
        (true, None) => {
            let Some(classes) = asked else {
                let message = format!(
                    "is not set, and {} is a language model, which gets a new head; give the number of classes",
                    base.display()
                );
                return Err(Error::config("num_labels", message));
            };
            if !config.lora.use_peft {
                let message = format!(
                    "is false, and {} is a language model: a new head is trained beside an adapter; set use_peft: true, \
                     or give a classifier",
                    base.display()
                );
                return Err(Error::config("use_peft", message));
            }
            Ok(decoder.with_classifier(Classifier::over(&keys, classes)?))
        }
    }
}

/// The classes that the rows for `decoder` are of, by the names that its `base` has for them.
///
/// # Errors
/// [`Error::Model`] if there is no config.
pub fn classes(base: &Path, decoder: &DecoderConfig) -> Result<Option<Classes>> {
    let Some(classifier) = decoder.classifier else {
        return Ok(None);
    };
    let names = Classifier::names(&HfConfig::open(base)?, classifier.classes);
    Ok(Some(Classes { names }))
}
