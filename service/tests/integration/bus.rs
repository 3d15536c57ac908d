//! What every bus adapter promises.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use service::adapters::bus::{self, Bus, Delivery, Subscription};
use service::domain::events::{Event, Kind};
use service::domain::orders::{ItemRequest, Order, OrderRequest};

use crate::broker::Broker;
use crate::test_app::shipped_config;

fn event() -> Event {
    let item = ItemRequest {
        sku: "tea".to_owned(),
        quantity: 1,
        unit_price_cents: 5,
    };
    let request = OrderRequest {
        customer: "ada".to_owned(),
        currency: "EUR".to_owned(),
        items: vec![item],
        contact: None,
    };
    Event::new(Kind::Placed, &Order::place(request, 50).unwrap())
}

/// A publisher that does as the relay does: again, until it is told that nothing is lost.
fn publish(bus: &Arc<dyn Bus>, events: &[Event]) -> tokio::task::JoinHandle<()> {
    let (bus, events) = (Arc::clone(bus), events.to_vec());
    tokio::spawn(async move {
        while bus.publish(&events).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
}

#[tokio::test]
async fn each_consumer_gets_all_in_order_and_again_until_it_is_done() {
    for broker in Broker::each().await {
        let mut config = shipped_config();
        broker.use_in(&mut config);
        // Each event is of another order: in one partition they have an order all the same.
        config.kafka.partitions = 1.try_into().unwrap();
        let bus = bus::open(&config);
        let kind = broker.kind;
        let mut first = bus.subscribe("first").await.unwrap();
        let mut second = bus.subscribe("second").await.unwrap();
        let events: Vec<Event> = (0..20).map(|_| event()).collect();
        let published = publish(&bus, &events);

        let read = |text: &str| serde_json::from_str::<Event>(text).unwrap().id;
        let wanted: Vec<_> = events.iter().map(|event| event.id).collect();
        let mut seen = Vec::new();
        for _ in &events {
            let delivery = second.next().await.unwrap();
            seen.push(read(&delivery.event));
            delivery.done().await.unwrap();
        }
        assert_eq!(seen, wanted, "{kind}");

        // The other one stops in the middle of the third; whoever takes its place gets that again.
        for _ in 0..2 {
            first.next().await.unwrap().done().await.unwrap();
        }
        let third = first.next().await.unwrap();
        assert_eq!(read(&third.event), wanted[2], "{kind}");
        drop((third, first));
        let mut first = bus.subscribe("first").await.unwrap();
        // What the second gets again it has had before.
        let again = tokio::spawn(async move {
            while let Ok(delivery) = second.next().await {
                let _ = delivery.done().await;
            }
        });
        let mut seen = Vec::new();
        while seen.last() != wanted.last() {
            let delivery = first.next().await.unwrap();
            let id = read(&delivery.event);
            delivery.done().await.unwrap();
            seen.push(id);
        }
        let begin = wanted.iter().position(|id| *id == seen[0]).unwrap();
        assert!(begin <= 2, "{kind}: it went on after {begin}");
        assert_eq!(seen, wanted[begin..], "{kind}");
        published.await.unwrap();
        again.abort();
    }
}

/// A consumer that comes late, such as with a broker that has just been set up, misses nothing: that
/// somebody else has heard it is not enough.
#[tokio::test]
async fn what_is_told_before_a_consumer_comes_is_kept_for_it() {
    for broker in Broker::each().await {
        let mut config = shipped_config();
        broker.use_in(&mut config);
        config.kafka.partitions = 1.try_into().unwrap();
        let kind = broker.kind;
        let bus = bus::open(&config);
        let _somebody_else = bus.listen().await.unwrap();
        let events: Vec<Event> = (0..5).map(|_| event()).collect();
        let mut published = publish(&bus, &events);
        // In process it is not told before.
        if kind != "in-process" {
            (&mut published).await.unwrap();
        }
        let mut late = bus.subscribe("totals").await.unwrap();
        for event in &events {
            let next = tokio::time::timeout(Duration::from_secs(30), late.next());
            let delivery = next.await.expect(kind).unwrap();
            let told: Event = serde_json::from_str(&delivery.event).unwrap();
            assert_eq!(told.id, event.id, "{kind}");
            delivery.done().await.unwrap();
        }
        published.abort();
    }
}

/// Whoever listens hears all that is told from then on, as every other process does.
#[tokio::test]
async fn every_process_hears_everything() {
    for broker in Broker::each().await {
        let mut config = shipped_config();
        broker.use_in(&mut config);
        let kind = broker.kind;
        let bus = bus::open(&config);
        // In process there is but one process.
        let other = match kind {
            "in-process" => Arc::clone(&bus),
            _ => bus::open(&config),
        };
        let mut consumers = Vec::new();
        for name in ["first", "second"] {
            let mut consumer = bus.subscribe(name).await.unwrap();
            consumers.push(tokio::spawn(async move {
                while let Ok(delivery) = consumer.next().await {
                    let _ = delivery.done().await;
                }
            }));
        }
        let mut here = bus.listen().await.unwrap();
        let mut there = other.listen().await.unwrap();
        let events: Vec<Event> = (0..5).map(|_| event()).collect();
        publish(&bus, &events).await.unwrap();
        let read = |text: &str| serde_json::from_str::<Event>(text).unwrap().id;
        let wanted: std::collections::BTreeSet<_> = events.iter().map(|event| event.id).collect();
        for ear in [&mut here, &mut there] {
            let mut heard = std::collections::BTreeSet::new();
            while heard.len() < wanted.len() {
                let next = tokio::time::timeout(Duration::from_secs(20), ear.next()).await;
                heard.insert(read(&next.unwrap().unwrap().event));
            }
            assert_eq!(heard, wanted, "{kind}");
        }
        for consumer in consumers {
            consumer.abort();
        }
    }
}

/// A consumer that crashes again and again, such as where its database is away for long, loses nothing.
/// From RabbitMQ 4.0 on that depends on how the queue was made.
#[tokio::test]
async fn what_is_returned_again_and_again_stays() {
    for broker in [Broker::in_process(), Broker::rabbitmq().await] {
        let mut config = shipped_config();
        broker.use_in(&mut config);
        let bus = bus::open(&config);
        let event = event();
        let mut consumer = bus.subscribe("totals").await.unwrap();
        let published = publish(&bus, std::slice::from_ref(&event));
        for _ in 0..25 {
            drop(next(&mut consumer).await);
            drop(consumer);
            consumer = bus.subscribe("totals").await.unwrap();
        }
        let delivery = next(&mut consumer).await;
        assert_eq!(id(&delivery), event.id, "{}", broker.kind);
        delivery.done().await.unwrap();
        published.await.unwrap();
        if broker.kind == "rabbitmq" {
            let arguments = broker.arguments("totals").await;
            assert_eq!(arguments["x-delivery-limit"], i32::MAX, "{arguments}");
        }
    }
}

/// A release from before queues had a limit has made it.
#[tokio::test]
async fn the_queue_of_an_older_release_is_used() {
    let older = json!({ "x-queue-type": "quorum", "x-single-active-consumer": true });
    let (broker, bus) = with_a_queue(&older).await;
    let event = event();
    bus.publish(std::slice::from_ref(&event)).await.unwrap();
    let mut consumer = bus.subscribe("totals").await.unwrap();
    let delivery = next(&mut consumer).await;
    assert_eq!(id(&delivery), event.id);
    delivery.done().await.unwrap();

    // Where it is removed meanwhile, none like it is made.
    drop(consumer);
    broker.remove_queue("totals").await;
    publish(&bus, std::slice::from_ref(&event)).await.unwrap();
    let arguments = broker.arguments("totals").await;
    assert_eq!(arguments["x-delivery-limit"], i32::MAX, "{arguments}");
}

/// Where several could consume at once, or a full queue forgets, nothing is promised.
#[tokio::test]
async fn a_queue_that_promises_less_is_refused() {
    let other = json!({ "x-queue-type": "quorum", "x-max-length": 1000 });
    let (_broker, bus) = with_a_queue(&other).await;
    for failed in [
        bus.publish(&[event()]).await.err(),
        bus.subscribe("totals").await.err(),
    ] {
        let error = failed.unwrap().to_string();
        assert!(error.contains("inequivalent arg"), "{error}");
    }
}

/// RabbitMQ with a queue for "totals" that the service has not made.
async fn with_a_queue(arguments: &Value) -> (Broker, Arc<dyn Bus>) {
    let broker = Broker::rabbitmq().await;
    broker.make_queue("totals", arguments).await;
    let mut config = shipped_config();
    broker.use_in(&mut config);
    (broker, bus::open(&config))
}

async fn next(consumer: &mut Box<dyn Subscription>) -> Delivery {
    let next = tokio::time::timeout(Duration::from_secs(30), consumer.next()).await;
    next.expect("an event within 30 s").unwrap()
}

fn id(delivery: &Delivery) -> uuid::Uuid {
    serde_json::from_str::<Event>(&delivery.event).unwrap().id
}

#[tokio::test]
async fn a_broker_that_is_away_is_an_error_in_time() {
    let mut config = shipped_config();
    config.events.bus = service::config::BusKind::Kafka;
    config.kafka.bootstrap_servers = "127.0.0.1:9".to_owned();
    let bus = bus::open(&config);
    let late = Duration::from_secs(30);
    for failed in [
        tokio::time::timeout(late, bus.publish(&[event()]))
            .await
            .unwrap()
            .is_err(),
        tokio::time::timeout(late, bus.subscribe("first"))
            .await
            .unwrap()
            .is_err(),
    ] {
        assert!(failed);
    }

    let mut config = shipped_config();
    config.events.bus = service::config::BusKind::RabbitMq;
    // Nobody listens there.
    config.rabbitmq.url.0 = "amqp://guest:s3cret@127.0.0.1:9".to_owned();
    let bus = bus::open(&config);
    let error = bus.publish(&[event()]).await.unwrap_err().to_string();
    assert!(error.contains("amqp://guest:***@127.0.0.1:9"), "{error}");
    assert!(bus.subscribe("first").await.is_err());
}
