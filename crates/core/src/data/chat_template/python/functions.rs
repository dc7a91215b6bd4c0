//! Jinja's functions, and those that transformers adds.

use super::objects::Range;
use super::{Result, bind, error, integer, items, required};
use minijinja::value::{Kwargs, Object, ObjectRepr, Rest, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

pub(super) fn install(environment: &mut Environment<'static>) {
    environment.remove_global("debug");
    environment.add_global("dict", Value::from_object(Dict));
    environment.add_function("range", |args: Rest<Value>| range(&args));
    environment.add_function("namespace", |state: &State, args: Rest<ValueOrKwargs>| {
        namespace(state, &args.into_values())
    });
    environment.add_function("joiner", |args: Rest<ValueOrKwargs>| -> Result {
        let [separator] = bind("joiner", ["sep"], &args.into_values())?;
        Ok(Value::from_object(Joiner {
            separator: separator.unwrap_or_else(|| Value::from(", ")),
            used: AtomicBool::new(false),
        }))
    });
    environment.add_function("cycler", |items: Rest<Value>| -> Result {
        match items.is_empty() {
            true => Err(error("`cycler` takes at least one item")),
            false => Ok(Value::from_object(Cycler {
                items: items.to_vec(),
                at: AtomicUsize::new(0),
            })),
        }
    });
    environment.add_function("lipsum", |_: Rest<ValueOrKwargs>| -> Result {
        Err(error(
            "`lipsum` is random text, and the same rows must give the same tokens",
        ))
    });
    environment.add_function("raise_exception", |message: String| -> Result {
        Err(error(message))
    });
}

fn range(args: &[Value]) -> Result {
    let numbers: Vec<i64> = args
        .iter()
        .map(|value| integer("`range`", value))
        .collect::<Result<_>>()?;
    match numbers.as_slice() {
        [stop] => Range::value(0, *stop, 1),
        [start, stop] => Range::value(*start, *stop, 1),
        [start, stop, step] => Range::value(*start, *stop, *step),
        _ => Err(error("`range` takes one to three numbers")),
    }
}

/// The pairs of `dict(pairs, name=value)`.
fn pairs_of(state: &State, function: &str, args: &[Value]) -> Result<Vec<(Value, Value)>> {
    let (positional, keywords) = match args.split_last() {
        Some((last, rest)) if last.is_kwargs() => (rest, Some(last)),
        _ => (args, None),
    };
    let mut pairs: Vec<(Value, Value)> = Vec::new();
    match positional {
        [] => {}
        [map] if map.kind() == ValueKind::Map => {
            for key in items(state, map)? {
                pairs.push((key.clone(), map.get_item(&key)?));
            }
        }
        [list] if list.kind() != ValueKind::String => {
            for pair in items(state, list)? {
                let pair = items(state, &pair)?;
                let [key, value] = pair.as_slice() else {
                    return Err(error(format!(
                        "`{function}` takes pairs of a key and a value"
                    )));
                };
                pairs.push((key.clone(), value.clone()));
            }
        }
        _ => {
            return Err(error(format!(
                "`{function}` takes a mapping and named values"
            )));
        }
    }
    if let Some(keywords) = keywords {
        let (keywords,): (Kwargs,) = from_args(std::slice::from_ref(keywords))?;
        for name in keywords.args() {
            pairs.push((Value::from(name), keywords.peek(name)?));
        }
    }
    Ok(pairs)
}

fn namespace(state: &State, args: &[Value]) -> Result {
    let pairs = pairs_of(state, "namespace", args)?;
    for (key, _) in &pairs {
        if key.as_str().is_some_and(|name| name.starts_with('_')) {
            return Err(error(format!(
                "an attribute of a namespace cannot begin with an underscore: `{key}`"
            )));
        }
    }
    let defaults: ValueOrKwargs = {
        let value = Value::from_pairs(pairs);
        let (defaults,) = from_args(std::slice::from_ref(&value))?;
        defaults
    };
    minijinja::functions::namespace(Some(defaults))
}

/// `dict(...)` and `dict.fromkeys(...)`.
#[derive(Debug)]
struct Dict;

impl Object for Dict {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, state: &mut State, args: &[Value]) -> Result {
        Ok(Value::from_pairs(pairs_of(state, "dict", args)?))
    }

    fn call_method(self: &Arc<Self>, state: &mut State, method: &str, args: &[Value]) -> Result {
        if method != "fromkeys" {
            return Err(Error::from(ErrorKind::UnknownMethod));
        }
        let [keys, value] = bind("fromkeys", ["iterable", "value"], args)?;
        let keys = items(state, &required("fromkeys", "iterable", keys)?)?;
        let value = value.unwrap_or_else(|| Value::from(()));
        Ok(Value::from_pairs(
            keys.into_iter().map(|key| (key, value.clone())),
        ))
    }
}

/// Nothing at the first call, its separator at the others.
#[derive(Debug)]
struct Joiner {
    separator: Value,
    used: AtomicBool,
}

impl Object for Joiner {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, _: &mut State, _: &[Value]) -> Result {
        Ok(match self.used.swap(true, Ordering::Relaxed) {
            true => self.separator.clone(),
            false => Value::from(""),
        })
    }
}

/// Its items in turn.
#[derive(Debug)]
struct Cycler {
    items: Vec<Value>,
    at: AtomicUsize,
}

impl Object for Cycler {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let at = self.at.load(Ordering::Relaxed);
        match key.as_str()? {
            "current" => Some(self.items[at].clone()),
            "pos" => Some(Value::from(at)),
            "items" => Some(Value::from(self.items.clone())),
            _ => None,
        }
    }

    fn call_method(self: &Arc<Self>, _: &mut State, method: &str, args: &[Value]) -> Result {
        let [] = bind(method, [], args)?;
        match method {
            "next" => {
                let at = self.at.load(Ordering::Relaxed);
                self.at
                    .store((at + 1) % self.items.len(), Ordering::Relaxed);
                Ok(self.items[at].clone())
            }
            "reset" => {
                self.at.store(0, Ordering::Relaxed);
                Ok(Value::from(()))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}
