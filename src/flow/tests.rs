//! Tests of the state machine, event by event.

use super::*;

fn actions(flow: &mut Flow) -> Vec<Action> {
    std::iter::from_fn(|| flow.next()).collect()
}

#[test]
fn what_a_target_sent_before_it_reset_the_new_connection_is_delivered() {
    let half = Side::Connect;
    let flow = &mut Flow::connecting(Transfer::Copy, 1000);
    assert!(actions(flow).contains(&Action::Start(Op::Connect)));
    flow.on(Event::Connected(Err(Errno::ECONNRESET)));
    assert!(actions(flow).contains(&Action::Start(Op::Readable(half))));
    flow.on(Event::Turn);
    flow.on(Event::Readable { half, urgent: Ok(false) });
    assert_eq!(actions(flow), [Action::Start(Op::Recv(half))]);
    flow.on(Event::Received { half, result: Ok(10), more: false });
    assert!(actions(flow).contains(&Action::Start(Op::Send(half))));
    flow.on(Event::Sent { half, result: Ok(10) });
    flow.on(Event::Readable { half, urgent: Ok(false) });
    assert_eq!(actions(flow), [Action::Release(half), Action::Start(Op::Recv(half))]);
    flow.on(Event::Received { half, result: Ok(0), more: false });
    assert!(actions(flow).contains(&Action::Ask(Question::Unsent(Side::Listen))));
    flow.on(Event::Unsent { bytes: 0 });
    assert!(actions(flow).contains(&Action::Cancel(Op::Watch(half))));
    flow.on(Event::Watched { side: half, writable: false, failed: false, armed: false });
    flow.on(Event::Paused);
    assert_eq!(actions(flow), [Action::Close { reset: [true, true] }]);
    assert_eq!(flow.end(), Some(End::Failed(half, Errno::ECONNRESET)));
}

#[test]
fn a_flow_leaves_between_two_messages_and_loses_none_that_comes_meanwhile() {
    let [half, other] = Side::BOTH;
    let flow = &mut Flow::connected(Transfer::Copy, 1000);
    let waits = [half, other].map(|half| Action::Start(Op::Readable(half)));
    assert_eq!(actions(flow), waits);
    flow.on(Event::Readable { half, urgent: Ok(false) });
    assert_eq!(actions(flow), [Action::Start(Op::Recv(half))]);
    flow.on(Event::Leave);
    assert_eq!(actions(flow), [], "a message is on its way");
    flow.on(Event::Received { half, result: Ok(10), more: false });
    assert_eq!(actions(flow), [Op::Send(half), Op::Readable(half)].map(Action::Start));
    flow.on(Event::Sent { half, result: Ok(4) });
    let watches = [Op::Watch(other), Op::Watch(half)];
    assert_eq!(actions(flow), watches.map(Action::Start), "a part of it still is");
    flow.on(Event::Watched { side: other, writable: true, failed: false, armed: true });
    assert_eq!(actions(flow), [Action::Start(Op::Send(half))]);
    flow.on(Event::Sent { half, result: Ok(6) });
    assert_eq!(flow.next(), Some(Action::Release(half)));
    let in_flight = [Op::Readable(half), Op::Readable(other), Op::Watch(half), Op::Watch(other)];
    assert_eq!(actions(flow), in_flight.map(Action::Cancel));
    flow.on(Event::Readable { half, urgent: Ok(false) });
    for side in Side::BOTH {
        flow.on(Event::Watched { side, writable: false, failed: false, armed: false });
    }
    assert_eq!(actions(flow), [], "a request is still in flight");
    flow.on(Event::Readable { half: other, urgent: Err(Errno::ECANCELED) });
    assert_eq!(flow.next(), Some(Action::Leave));
    // With another engine.
    assert_eq!(actions(flow), [Op::Recv(half), Op::Readable(other)].map(Action::Start));
}

#[test]
fn a_flow_that_fails_does_not_leave() {
    let half = Side::Listen;
    let flow = &mut Flow::connected(Transfer::Copy, 1000);
    actions(flow);
    flow.on(Event::Readable { half, urgent: Ok(false) });
    actions(flow);
    flow.on(Event::Leave);
    flow.on(Event::Received { half, result: Err(Errno::ECONNRESET), more: false });
    let wanted = actions(flow);
    assert!(!wanted.contains(&Action::Leave), "{wanted:?}");
    assert!(wanted.contains(&Action::Ask(Question::Unsent(!half))), "{wanted:?}");
}

#[test]
fn a_flow_that_waits_for_its_turn_does_not_leave() {
    let half = Side::Listen;
    let flow = &mut Flow::connected(Transfer::Splice, 1000);
    actions(flow);
    flow.on(Event::Readable { half, urgent: Ok(false) });
    assert_eq!(actions(flow), [Action::Yield]);
    flow.on(Event::Leave);
    assert_eq!(actions(flow), [], "its worker has it in the queue");
    flow.on(Event::Turn);
    assert_ne!(flow.next(), None);
}
