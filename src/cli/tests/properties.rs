//! What holds for any argv.

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::super::options::{Opt, all};
use super::*;

/// One appearance of an option on a command line.
#[derive(Clone, Debug)]
struct Occurrence {
    long: &'static str,
    short: Option<char>,
    value: Option<String>,
    spelling: Spelling,
}

#[derive(Clone, Copy, Debug)]
enum Spelling {
    Long,
    LongEquals,
    Short,
    ShortGlued,
}

/// Values that are valid, with those that look like something else well represented.
fn value(placeholder: &str) -> BoxedStrategy<String> {
    let netns = || {
        prop_oneof![
            "[^\0:]{0,6}",
            select(vec!["-", "--", "-l", "--help", "help", "=", "a=b"]).prop_map(String::from),
            (1..=u32::MAX).prop_map(|pid| format!("pid:{pid}")),
        ]
    };
    match placeholder {
        "IP:PORT" => any::<SocketAddr>().prop_map(|address| address.to_string()).boxed(),
        "FD" => any::<u64>().prop_map(|number| number.to_string()).boxed(),
        "NETNS" => netns().boxed(),
        "N" => (1..=1024_u32).prop_map(|number| number.to_string()).boxed(),
        "LIST" => "[0-9]{1,3}(,[0-4]-[5-9][0-9]?){0,3}".boxed(),
        "CONNECTIONS" | "CLIENTS" => (1..=10_000_000_u32).prop_map(|n| n.to_string()).boxed(),
        "TIMES|off" => "[1-9][0-9]{0,3},[1-9][0-9]?,[1-9]|off".boxed(),
        "USEC" => (0..=1_000_000_u32).prop_map(|us| us.to_string()).boxed(),
        "SECONDS" => "[0-9]{1,4}([.][0-9]{1,3})?".boxed(),
        "BYTES" => "([4-9]|[1-9][0-9]{1,2})[KM]".boxed(),
        words => select(words.split('|').map(String::from).collect::<Vec<_>>()).boxed(),
    }
}

fn occurrence() -> impl Strategy<Value = Occurrence> {
    let options: Vec<&'static Opt> =
        all().filter(|option| ![options::HELP, options::VERSION].contains(&option.long)).collect();
    let spellings =
        vec![Spelling::Long, Spelling::LongEquals, Spelling::Short, Spelling::ShortGlued];
    (any::<Index>(), select(spellings)).prop_flat_map(move |(index, spelling)| {
        let option = index.get(&options);
        let value = match &option.value {
            None => Just(None).boxed(),
            Some(wanted) => value(wanted.name).prop_map(Some).boxed(),
        };
        let (long, short) = (option.long, option.short);
        value.prop_map(move |value| Occurrence { long, short, value, spelling })
    })
}

/// The occurrences as someone might type them: bundled wherever a switch comes before.
fn spelled(occurrences: &[Occurrence]) -> Vec<String> {
    let mut argv: Vec<String> = vec!["prog".into()];
    let mut open_bundle = false;
    for Occurrence { long, short, value, spelling } in occurrences {
        let (head, glue) = match (spelling, short) {
            (Spelling::Short, Some(short)) => (short.to_string(), None),
            (Spelling::ShortGlued, Some(short)) => (short.to_string(), Some("")),
            (Spelling::LongEquals, _) => (long.to_string(), Some("=")),
            _ => (long.to_string(), None),
        };
        let is_long = head.starts_with("--");
        match argv.last_mut() {
            Some(bundle) if open_bundle && !is_long => bundle.push_str(&head),
            _ if is_long => argv.push(head),
            _ => argv.push(format!("-{head}")),
        }
        open_bundle = !is_long && value.is_none();
        match (value, glue) {
            (None, _) => {}
            // `-o` alone with nothing glued to it would take the next argument.
            (Some(value), Some(glue)) if is_long || !value.is_empty() => {
                let last = argv.last_mut().unwrap();
                last.push_str(glue);
                last.push_str(value);
            }
            (Some(value), _) => argv.push(value.clone()),
        }
    }
    argv
}

/// The same in one spelling, in the order of the table, each option once.
fn canonical(occurrences: &[Occurrence]) -> Vec<String> {
    let mut argv: Vec<String> = vec!["prog".into()];
    for option in all() {
        if let Some(last) = occurrences.iter().rfind(|typed| typed.long == option.long) {
            argv.push(last.long.into());
            argv.extend(last.value.clone());
        }
    }
    argv
}

fn parse_strings(argv: Vec<String>) -> Result<Command> {
    parse(argv.into_iter().map(OsString::from).collect())
}

/// Bytes that come close to a command line.
fn almost_argument() -> impl Strategy<Value = Vec<u8>> {
    let shorts: Vec<char> = all().filter_map(|option| option.short).collect();
    let longs: Vec<&'static str> = all().map(|option| option.long).collect();
    let tail = || proptest::collection::vec(any::<u8>(), 0..6);
    prop_oneof![
        tail(),
        (select(longs), "=?", tail()).prop_map(|(long, equals, tail)| {
            [long.as_bytes(), equals.as_bytes(), &tail].concat()
        }),
        (select(shorts), tail())
            .prop_map(|(short, tail)| [format!("-{short}").as_bytes(), &tail].concat()),
        "(pid:|--?)?[-0-9.:,=KM]{0,9}".prop_map(String::into_bytes),
    ]
}

proptest! {
    #[test]
    fn any_spelling_and_order_means_its_canonical_form(
        occurrences in proptest::collection::vec(occurrence(), 0..12)
    ) {
        let wanted = parse_strings(canonical(&occurrences));
        prop_assert!(matches!(wanted, Ok(Command::Run(_))), "{wanted:?}");
        prop_assert_eq!(parse_strings(spelled(&occurrences)), wanted);
    }

    #[test]
    fn no_bytes_make_it_panic_and_argh_takes_what_the_normaliser_took(
        argv in proptest::collection::vec(almost_argument(), 0..6)
    ) {
        let argv: Vec<OsString> = argv.into_iter().map(OsString::from_vec).collect();
        let outcome = parse(argv.clone());
        prop_assert_eq!(normalise::normalise(argv).is_ok(), outcome.is_ok());
        if let Err(error) = &outcome {
            prop_assert_eq!(error.kind(), Kind::Usage);
        }
        if let Ok(Command::Run(args)) = outcome
            && let Err(error) = args.into_config()
        {
            prop_assert_eq!(error.kind(), Kind::Mix);
        }
    }
}
