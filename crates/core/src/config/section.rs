//! Sections: a struct per part of the configuration, whose declaration is also the table of keys.

use super::value::Arity;
use serde_json::Value;

/// One key of the configuration file, as the documentation and the schema show it.
#[derive(Clone, Debug, PartialEq)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// The part of the engine that uses it.
    pub section: &'static str,
    /// What it does.
    pub doc: String,
    /// Its value when not set.
    pub default: Value,
    /// Whose default that is.
    pub default_source: &'static str,
    /// JSON schema of its value.
    pub schema: Value,
    /// How many words its value has on a command line.
    pub arity: Arity,
}

/// A part of the configuration: typed fields, reachable by key.
pub(super) trait Section {
    /// The table of its keys, in declaration order.
    fn keys(&self) -> Vec<Key>;

    /// Sets `key` from a parsed value; `None` if the key is not of this section.
    fn set(&mut self, key: &str, value: &Value) -> Option<Result<(), String>>;

    /// The value of `key` as it is saved; `None` if the key is not of this section.
    fn get(&self, key: &str) -> Option<Value>;

    /// Command line text to the value YAML would have given, by the type of `key`.
    fn parse_text(&self, key: &str, text: &str) -> Option<Result<Value, String>>;
}

/// Declares a section: its struct, its defaults, its table of keys and access by key.
///
/// One line per key: documentation, name, type, default, and where that default comes from.
macro_rules! section {
    (
        $(#[doc = $doc:literal])+
        $name:ident, $title:literal {
            $(
                $(#[doc = $key_doc:literal])+
                $key:ident: $type:ty = $default:expr, $source:expr;
            )+
        }
    ) => {
        $(#[doc = $doc])+
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name {
            $( $(#[doc = $key_doc])+ pub $key: $type, )+
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $( $key: $default, )+ }
            }
        }

        impl $crate::config::section::Section for $name {
            fn keys(&self) -> Vec<$crate::config::Key> {
                use $crate::config::value::KeyValue;
                let defaults = Self::default();
                vec![ $( $crate::config::Key {
                    name: stringify!($key),
                    section: $title,
                    doc: concat!($($key_doc),+).trim().to_owned(),
                    default: defaults.$key.to_value(),
                    default_source: $source,
                    schema: <$type as KeyValue>::schema(),
                    arity: <$type as KeyValue>::ARITY,
                } ),+ ]
            }

            fn set(
                &mut self,
                key: &str,
                value: &serde_json::Value,
            ) -> Option<Result<(), String>> {
                use $crate::config::value::KeyValue;
                match key {
                    $( stringify!($key) => Some(
                        <$type as KeyValue>::from_value(value).map(|value| self.$key = value),
                    ), )+
                    _ => None,
                }
            }

            fn get(&self, key: &str) -> Option<serde_json::Value> {
                use $crate::config::value::KeyValue;
                match key {
                    $( stringify!($key) => Some(self.$key.to_value()), )+
                    _ => None,
                }
            }

            fn parse_text(
                &self,
                key: &str,
                text: &str,
            ) -> Option<Result<serde_json::Value, String>> {
                use $crate::config::value::KeyValue;
                match key {
                    $( stringify!($key) => Some(<$type as KeyValue>::parse_text(text)), )+
                    _ => None,
                }
            }
        }
    };
}
pub(super) use section;
