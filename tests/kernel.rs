//! What nsplice relies on of the kernel, one small test for each fact.
//!
//! A test is named after its fact and says, when it fails, what the kernel did instead and what
//! follows for nsplice. Some facts are the reason why nsplice does *not* use something: where
//! those no longer hold nothing breaks, and the sentence says so. The source names the file of the
//! facts it relies on.

#![allow(clippy::unwrap_used)]

#[path = "kernel/mod.rs"]
mod facts;
mod support;
