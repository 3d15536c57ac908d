//! The four interfaces: the same use cases, results and errors.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Body;
use futures_util::{SinkExt, StreamExt};
use hyper::client::conn::http2;
use hyper::ext::Protocol;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use service::api::fault::{Fault, Names};
use service::api::grpc::pb;
use service::api::grpc::pb::orders_client::OrdersClient;
use service::config::{AuthMode, Timeout};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};
use tonic::transport::Channel;
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt;
use tracing_subscriber::layer::SubscriberExt;

use crate::database::Database;
use crate::test_app::{TestApp, order, without_limit};

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

async fn channel(app: &TestApp) -> Channel {
    let address = format!("http://{}", app.public);
    Channel::from_shared(address)
        .unwrap()
        .connect()
        .await
        .unwrap()
}

async fn orders(app: &TestApp) -> OrdersClient<Channel> {
    OrdersClient::new(channel(app).await)
}

async fn graphql(app: &TestApp, query: &str, variables: Value) -> Value {
    let body = json!({ "query": query, "variables": variables });
    let (status, answer) = app.post("/graphql", body).await;
    assert_eq!(status, 200, "{answer}");
    answer
}

async fn socket(app: &TestApp, path: &str, protocol: Option<&str>) -> Socket {
    let address = format!("ws://{}{path}", app.public);
    let mut request = address.into_client_request().unwrap();
    if let Some(protocol) = protocol {
        let name = "sec-websocket-protocol";
        request
            .headers_mut()
            .insert(name, protocol.parse().unwrap());
    }
    connect_async(request).await.unwrap().0
}

/// The next message that is not a ping.
async fn next<S>(socket: &mut WebSocketStream<S>) -> Option<Message>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        match tokio::time::timeout(Duration::from_secs(20), socket.next()).await {
            Ok(Some(Ok(Message::Ping(_)))) => {}
            Ok(message) => return message.transpose().unwrap(),
            Err(_) => panic!("nothing was said for 20 s"),
        }
    }
}

async fn next_json<S>(socket: &mut WebSocketStream<S>) -> Value
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    match next(socket).await {
        Some(Message::Text(text)) => serde_json::from_str(&text).unwrap(),
        other => panic!("{other:?}"),
    }
}

async fn close_code(socket: &mut Socket) -> u16 {
    loop {
        match next(socket).await {
            Some(Message::Close(Some(frame))) => return frame.code.into(),
            Some(Message::Text(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}

pub fn place(order: &Value) -> pb::PlaceOrderRequest {
    let items = order["items"].as_array().unwrap().iter();
    let items = items.map(|item| pb::Item {
        sku: item["sku"].as_str().unwrap().to_owned(),
        quantity: u32::try_from(item["quantity"].as_u64().unwrap()).unwrap(),
        unit_price_cents: item["unit_price_cents"].as_i64().unwrap(),
    });
    pb::PlaceOrderRequest {
        customer: order["customer"].as_str().unwrap().to_owned(),
        currency: order["currency"].as_str().unwrap().to_owned(),
        items: items.collect(),
        contact: None,
    }
}

pub const PLACE: &str = "mutation($order: NewOrder!, $key: String) {
    placeOrder(order: $order, idempotencyKey: $key) { id totalCents status } }";

/// An order as GraphQL's input has it.
pub fn new_order(order: &Value) -> Value {
    let items = order["items"].as_array().unwrap().iter();
    let items: Vec<Value> = items
        .map(|item| {
            json!({
                "sku": item["sku"], "quantity": item["quantity"],
                "unitPriceCents": item["unit_price_cents"],
            })
        })
        .collect();
    json!({ "customer": order["customer"], "currency": order["currency"], "items": items })
}

#[tokio::test]
async fn an_order_is_the_same_over_every_interface() {
    let app = TestApp::start().await;
    let mut grpc = orders(&app).await;
    let placed = grpc
        .place_order(place(&order()))
        .await
        .unwrap()
        .into_inner();
    assert!(!placed.repeated);
    let placed = placed.order.unwrap();
    assert_eq!(placed.total_cents, 2100);

    let (status, over_rest) = app.get(&format!("/v1/orders/{}", placed.id)).await;
    assert_eq!((status, &over_rest["total_cents"]), (200, &json!(2100)));
    let query = "query($id: String!) { order(id: $id) { id customer status totalCents createdAt
        items { sku quantity unitPriceCents } } }";
    let answer = graphql(&app, query, json!({ "id": placed.id })).await;
    let over_graphql = &answer["data"]["order"];
    assert_eq!(
        over_graphql["createdAt"], over_rest["created_at"],
        "{answer}"
    );
    assert_eq!(over_graphql["items"][1]["unitPriceCents"], 1200);

    let cancel = "mutation($id: String!) { cancelOrder(id: $id) { status } }";
    let answer = graphql(&app, cancel, json!({ "id": placed.id })).await;
    assert_eq!(
        answer["data"]["cancelOrder"]["status"], "CANCELLED",
        "{answer}"
    );
    let request = pb::GetOrderRequest { id: placed.id };
    let now = grpc.get_order(request).await.unwrap().into_inner();
    assert_eq!(now.status(), pb::Status::Cancelled);
}

/// The same wrong request: REST's problem, GraphQL's error and gRPC's status say the same.
#[tokio::test]
async fn errors_are_the_same_over_every_interface() {
    let app = TestApp::start().await;
    let mut grpc = orders(&app).await;
    let mut wrong = order();
    wrong["currency"] = json!("eur");
    wrong["items"][0]["quantity"] = json!(0);

    let (status, problem) = app.post("/v1/orders", wrong.clone()).await;
    assert_eq!(status, 422);
    let fields = |errors: &Value| -> Vec<String> {
        let errors = errors.as_array().unwrap().iter();
        errors
            .map(|error| error["field"].as_str().unwrap().to_owned())
            .collect()
    };
    let expected = ["/currency", "/items/0/quantity"];
    assert_eq!(fields(&problem["errors"]), expected);

    let answer = graphql(&app, PLACE, json!({ "order": new_order(&wrong) })).await;
    let extensions = &answer["errors"][0]["extensions"];
    assert_eq!(extensions["code"], "INVALID_REQUEST", "{answer}");
    assert_eq!(extensions["errors"], problem["errors"]);

    let refused = grpc.place_order(place(&wrong)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let details = refused.get_error_details();
    assert_eq!(details.error_info().unwrap().reason, "INVALID_REQUEST");
    let violations = &details.bad_request().unwrap().field_violations;
    let named: Vec<&str> = violations
        .iter()
        .map(|wrong| wrong.field.as_str())
        .collect();
    assert_eq!(named, expected);

    // An order that is not there.
    let nobody = "00000000-0000-7000-8000-000000000000";
    let (status, problem) = app.get(&format!("/v1/orders/{nobody}")).await;
    assert_eq!((status, &problem["type"]), (404, &json!("not-found")));
    let request = pb::GetOrderRequest {
        id: nobody.to_owned(),
    };
    let refused = grpc.get_order(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert_eq!(refused.message(), problem["detail"]);
    let cancel = format!("mutation {{ cancelOrder(id: \"{nobody}\") {{ id }} }}");
    let answer = graphql(&app, &cancel, json!({})).await;
    assert_eq!(answer["errors"][0]["extensions"]["code"], "NOT_FOUND");
    let query = format!("{{ order(id: \"{nobody}\") {{ id }} }}");
    assert_eq!(
        graphql(&app, &query, json!({})).await["data"]["order"],
        Value::Null
    );

    // A key that belongs to another request, whichever interface that came by.
    let key = [("Idempotency-Key", "once".to_owned())];
    let (status, first) = app
        .send_with(reqwest::Method::POST, "/v1/orders", Some(order()), &key)
        .await;
    assert_eq!(status, 201);
    let with_key = |order: &Value| {
        let mut request = Request::new(place(order));
        request
            .metadata_mut()
            .insert("idempotency-key", "once".parse().unwrap());
        request
    };
    let again = grpc
        .place_order(with_key(&order()))
        .await
        .unwrap()
        .into_inner();
    assert!(again.repeated);
    assert_eq!(again.order.unwrap().id, first["id"]);
    let mut other = order();
    other["customer"] = json!("bob");
    let refused = grpc.place_order(with_key(&other)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let variables = json!({ "order": new_order(&other), "key": "once" });
    let answer = graphql(&app, PLACE, variables).await;
    let code = &answer["errors"][0]["extensions"]["code"];
    assert_eq!(code, "IDEMPOTENCY_KEY_REUSED", "{answer}");
}

/// What the database says is the same by every interface, too.
#[tokio::test]
async fn a_database_that_takes_nothing_is_the_same_over_every_interface() {
    let database = Database::postgres().await;
    let app = TestApp::start_on(database.clone(), |_| {}).await;
    let is_everywhere = async |app: &TestApp, fault: Fault| {
        let Names {
            kind, http, grpc, ..
        } = fault.names();
        let (status, problem) = app.post("/v1/orders", order()).await;
        assert_eq!((status, &problem["type"]), (http.as_u16(), &json!(kind)));
        let answer = graphql(app, PLACE, json!({ "order": new_order(&order()) })).await;
        let code = kind.to_uppercase().replace('-', "_");
        assert_eq!(answer["errors"][0]["extensions"]["code"], code, "{answer}");
        let refused = orders(app).await.place_order(place(&order())).await;
        let refused = refused.unwrap_err();
        assert_eq!(refused.code(), grpc);
        let details = refused.get_error_details();
        assert_eq!(details.error_info().unwrap().reason, code);
    };
    let copy = app.beside(|config| config.database.read_only = true).await;
    is_everywhere(&copy, Fault::ReadOnly).await;

    let limit = Timeout(Duration::from_millis(300));
    let impatient = app
        .beside(|config| config.database.statement_timeout = limit)
        .await;
    let held = database.hold().await;
    is_everywhere(&impatient, Fault::Overloaded).await;
    drop(held);

    // Somebody has removed what is needed.
    app.execute("ALTER TABLE outbox RENAME TO gone").await;
    is_everywhere(&app, Fault::Internal).await;
    // Whoever counts failures counts those of each interface.
    let metrics = app.admin_text("/metrics").await;
    for route in ["/v1/orders", "/graphql", "/orders.v1.Orders/{method}"] {
        let line =
            format!("http_requests_total{{method=\"POST\",route=\"{route}\",status=\"500\"}}");
        assert!(metrics.contains(&line), "no {line} in {metrics}");
    }
}

/// What the library cannot read is not the service's failure, though it calls it one.
#[tokio::test]
async fn a_call_that_cannot_be_read_fails_nothing() {
    let app = TestApp::start().await;
    let client = reqwest::Client::builder().http2_prior_knowledge();
    let url = format!("http://{}/orders.v1.Orders/PlaceOrder", app.public);
    let garbage = client
        .build()
        .unwrap()
        .post(url)
        .body(&b"\0\0\0\0\x01\xff"[..]);
    let garbage = garbage.header("content-type", "application/grpc");
    let answer = garbage.send().await.unwrap();
    let mut counted = axum::http::Response::new(Body::empty());
    counted.headers_mut().clone_from(answer.headers());
    assert_eq!(answer.headers()["grpc-status"], "13", "{answer:?}");
    assert_eq!(service::api::grpc::status(&counted), 400);
    let details = "grpc-status-details-bin";
    counted.headers_mut().insert(details, "AA".parse().unwrap());
    assert_eq!(service::api::grpc::status(&counted), 500);
}

/// RFC 8441: a browser that has a connection by HTTP/2 opens its sockets on that.
#[tokio::test]
async fn a_socket_may_be_a_stream_of_http2() {
    let app = TestApp::start().await;
    let stream = TokioIo::new(TcpStream::connect(app.public).await.unwrap());
    let (mut http2, connection) = http2::handshake(TokioExecutor::new(), stream)
        .await
        .unwrap();
    tokio::spawn(connection);
    let to = |path: &str| format!("http://{}{path}", app.public);
    // That it takes sockets it says with its first answer.
    let first = axum::http::Request::get(to("/health/live")).body(Body::empty());
    assert_eq!(
        http2.send_request(first.unwrap()).await.unwrap().status(),
        200
    );

    let mut connect = async |origin: &str| {
        let request = axum::http::Request::connect(to("/v1/events"))
            .extension(Protocol::from_static("websocket"))
            .header("sec-websocket-version", "13")
            .header("origin", origin)
            .body(Body::empty());
        http2.send_request(request.unwrap()).await.unwrap()
    };
    assert_eq!(connect("http://elsewhere.example").await.status(), 403);
    let answer = connect(&to("")).await;
    assert_eq!(answer.status(), 200);
    let stream = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
    let mut socket = WebSocketStream::from_raw_socket(stream, Role::Client, None).await;
    let (_, placed) = app.post("/v1/orders", order()).await;
    let told = next_json(&mut socket).await;
    assert_eq!(told["subject"], placed["id"], "{told}");
}

/// Who has a socket and does not even say hello does not keep it.
#[tokio::test]
async fn a_graphql_socket_is_for_who_says_hello() {
    let app = TestApp::start().await;
    let mut silent = socket(&app, "/graphql", Some("graphql-transport-ws")).await;
    let mut polite = socket(&app, "/graphql", Some("graphql-transport-ws")).await;
    let hello = json!({ "type": "connection_init" }).to_string();
    polite.send(Message::text(hello)).await.unwrap();
    assert_eq!(next_json(&mut polite).await["type"], "connection_ack");
    assert_eq!(close_code(&mut silent).await, 4408);
    let listening = tokio::time::timeout(Duration::from_millis(100), next(&mut polite)).await;
    assert!(listening.is_err(), "{listening:?}");
}

#[tokio::test]
async fn grpc_pages_totals_health_and_reflection() {
    let app = TestApp::start().await;
    let mut grpc = orders(&app).await;
    for _ in 0..3 {
        grpc.place_order(place(&order())).await.unwrap();
    }
    let list = |page_size, page_token| pb::ListOrdersRequest {
        page_size,
        page_token,
    };
    let page = grpc
        .list_orders(list(2, String::new()))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(page.orders.len(), 2);
    let page = grpc
        .list_orders(list(2, page.next_page_token))
        .await
        .unwrap();
    let page = page.into_inner();
    assert_eq!((page.orders.len(), page.next_page_token.as_str()), (1, ""));
    let refused = grpc
        .list_orders(list(1000, String::new()))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);

    // They follow the orders a moment later.
    let request = || pb::GetTotalsRequest {
        customer: "ada".to_owned(),
    };
    let mut counted = 0;
    for _ in 0..100 {
        let totals = grpc
            .get_totals(request())
            .await
            .unwrap()
            .into_inner()
            .totals;
        counted = totals.first().map_or(0, |total| total.orders);
        if counted == 3 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(counted, 3);

    let mut health = HealthClient::new(channel(&app).await);
    let check = |service: &str| HealthCheckRequest {
        service: service.to_owned(),
    };
    let answer = health.check(check("orders.v1.Orders")).await.unwrap();
    assert_eq!(answer.into_inner().status(), ServingStatus::Serving);
    let refused = health.check(check("nobody")).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);

    let services = reflected_services(&app).await;
    assert!(
        services.contains(&"orders.v1.Orders".to_owned()),
        "{services:?}"
    );

    // A service that there is not.
    let mut unknown = tonic::client::Grpc::new(channel(&app).await);
    unknown.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<pb::GetOrderRequest, pb::Order>::default();
    let path = "/nobody.v1.Nothing/Do".parse().unwrap();
    let request = Request::new(pb::GetOrderRequest::default());
    let refused = unknown.unary(request, path, codec).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
}

/// What the layers around every interface refuse, gRPC's clients can read.
#[tokio::test]
async fn limits_speak_grpc() {
    let app = TestApp::start_with(|config| {
        config.rate_limit.per_second = 1.try_into().unwrap();
        config.rate_limit.burst = 1.try_into().unwrap();
    })
    .await;
    let mut grpc = orders(&app).await;
    grpc.list_orders(pb::ListOrdersRequest::default())
        .await
        .unwrap();
    let refused = grpc
        .list_orders(pb::ListOrdersRequest::default())
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    assert!(
        refused.metadata().contains_key("retry-after"),
        "{refused:?}"
    );
    // Whoever judges a release by its answers sees that, too, though HTTP says 200 to it.
    let metrics = app.admin_text("/metrics").await;
    let counted = metrics.lines().any(|line| {
        line.starts_with("http_requests_total{")
            && line.contains("/orders.v1.Orders/")
            && line.contains("status=\"429\"")
    });
    assert!(counted, "{metrics}");
    let timed = "grpc_request_duration_seconds_count{method=\"ListOrders\"}";
    assert!(metrics.contains(timed), "{metrics}");
    // Health is asked for however busy the process is.
    let mut health = HealthClient::new(channel(&app).await);
    for _ in 0..3 {
        let request = HealthCheckRequest::default();
        health.check(request).await.unwrap();
    }
}

/// What reflection tells is enough to call every method of every service.
#[tokio::test]
async fn every_method_that_reflection_tells_of_answers() {
    let app = TestApp::start().await;
    let mut methods = 0;
    for service in reflected_services(&app).await {
        for (path, streams) in reflected_methods(&app, &service).await {
            methods += 1;
            let mut client = tonic::client::Grpc::new(channel(&app).await);
            client.ready().await.unwrap();
            // An empty message, whatever its type.
            let codec = tonic_prost::ProstCodec::<(), ()>::default();
            let request = Request::new(());
            let path: axum::http::uri::PathAndQuery = path.parse().unwrap();
            let name = path.to_string();
            let code = if streams {
                let answer = client.server_streaming(request, path, codec).await;
                answer.map_or_else(|status| status.code(), |_| Code::Ok)
            } else {
                let answer = client.unary(request, path, codec).await;
                answer.map_or_else(|status| status.code(), |_| Code::Ok)
            };
            let known = [Code::Ok, Code::InvalidArgument, Code::NotFound];
            assert!(known.contains(&code), "{name}: {code:?}");
        }
    }
    // Six of orders, two of health; reflection's own takes a stream of questions.
    assert_eq!(methods, 8);
}

type Question = tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
type Told = tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

async fn reflect(app: &TestApp, question: Question) -> Told {
    let channel = channel(app).await;
    let mut reflection =
        tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient::new(channel);
    let request = tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(question),
    };
    let answers = reflection
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap();
    answer.message_response.unwrap()
}

async fn reflected_services(app: &TestApp) -> Vec<String> {
    let question = Question::ListServices(String::new());
    let Told::ListServicesResponse(services) = reflect(app, question).await else {
        panic!("no list of services");
    };
    services.service.into_iter().map(|s| s.name).collect()
}

/// The paths of a service's methods that take one message, and whether they answer with a stream.
async fn reflected_methods(app: &TestApp, service: &str) -> Vec<(String, bool)> {
    let question = Question::FileContainingSymbol(service.to_owned());
    let Told::FileDescriptorResponse(files) = reflect(app, question).await else {
        panic!("nothing is told of {service}");
    };
    let mut methods = Vec::new();
    for file in files.file_descriptor_proto {
        let file = <prost_types::FileDescriptorProto as prost::Message>::decode(&*file).unwrap();
        let package = file.package().to_owned();
        for described in &file.service {
            if format!("{package}.{}", described.name()) != service {
                continue;
            }
            let taken = described.method.iter().filter(|m| !m.client_streaming());
            methods.extend(taken.map(|method| {
                let path = format!("/{service}/{}", method.name());
                (path, method.server_streaming())
            }));
        }
    }
    methods
}

/// Live events: over a WebSocket, a subscription and a stream, until the process ends.
#[tokio::test]
async fn events_are_told_live_and_the_end_is_said() {
    let mut app = TestApp::start().await;
    let mut all = socket(&app, "/v1/events", None).await;
    let mut bobs = socket(&app, "/v1/events?customer=bob", None).await;
    let mut subscription = socket(&app, "/graphql", Some("graphql-transport-ws")).await;
    let say = async |socket: &mut Socket, message: Value| {
        let message = Message::text(message.to_string());
        socket.send(message).await.unwrap();
    };
    say(&mut subscription, json!({ "type": "connection_init" })).await;
    assert_eq!(next_json(&mut subscription).await["type"], "connection_ack");
    let query = "subscription { orderEvents { kind order { customer } } }";
    let subscribe = json!({ "id": "1", "type": "subscribe", "payload": { "query": query } });
    say(&mut subscription, subscribe).await;
    let mut grpc = orders(&app).await;
    let watch = pb::WatchOrdersRequest::default();
    let mut stream = grpc.watch_orders(watch).await.unwrap().into_inner();

    // The process listens to its bus, and the subscription begins, a moment after the start.
    let place_and_see = async |customer: &str| {
        let mut wanted = order();
        wanted["customer"] = json!(customer);
        let (_, placed) = app.post("/v1/orders", wanted).await;
        placed["id"].as_str().unwrap().to_owned()
    };
    let mut first = Vec::new();
    loop {
        first.push(place_and_see("ada").await);
        let seen = tokio::time::timeout(Duration::from_millis(200), subscription.next()).await;
        match seen {
            Ok(Some(Ok(Message::Text(text)))) => {
                let event: Value = serde_json::from_str(&text).unwrap();
                let event = &event["payload"]["data"]["orderEvents"];
                assert_eq!(event["kind"], "PLACED", "{text}");
                assert_eq!(event["order"]["customer"], "ada");
                break;
            }
            Ok(Some(Ok(Message::Ping(_)))) => {}
            Ok(other) => panic!("{other:?}"),
            Err(_) => assert!(first.len() < 50, "nothing was told"),
        }
    }
    let event = next_json(&mut all).await;
    assert_eq!(event["type"], "order.placed.v1");
    assert!(first.contains(&event["subject"].as_str().unwrap().to_owned()));
    let event = stream.message().await.unwrap().unwrap();
    assert_eq!(event.kind(), pb::order_event::Kind::Placed);

    let of_bob = place_and_see("bob").await;
    assert_eq!(next_json(&mut bobs).await["subject"], of_bob);

    // Clients have nothing to say.
    let mut talker = socket(&app, "/v1/events", None).await;
    talker.send(Message::text("hello")).await.unwrap();
    assert_eq!(close_code(&mut talker).await, 1003);

    app.begin_stop();
    assert_eq!(close_code(&mut all).await, 1001);
    assert_eq!(close_code(&mut bobs).await, 1001);
    assert_eq!(close_code(&mut subscription).await, 1001);
    while stream.message().await.unwrap().is_some() {}
    app.stopped().await.unwrap();
}

/// On a GraphQL socket nothing but subscriptions is done, and it is kept alive as any other.
#[tokio::test]
async fn a_graphql_socket_is_for_subscriptions() {
    let app = TestApp::start_with(|config| {
        config.server.heartbeat.0 = Duration::from_millis(100);
    })
    .await;
    let mut socket = socket(&app, "/graphql", Some("graphql-transport-ws")).await;
    let cancel = "mutation { cancelOrder(id: \"x\") { id } }";
    for message in [
        json!({ "type": "connection_init" }),
        json!({ "id": "1", "type": "subscribe", "payload": { "query": cancel } }),
        json!({ "id": "2", "type": "subscribe", "payload": {
            "query": "subscription { orderEvents { id } }" } }),
    ] {
        socket
            .send(Message::text(message.to_string()))
            .await
            .unwrap();
    }
    assert_eq!(next_json(&mut socket).await["type"], "connection_ack");
    let refused = next_json(&mut socket).await.to_string();
    assert!(refused.contains("Only subscriptions"), "{refused}");
    assert_eq!(next_json(&mut socket).await["type"], "complete");
    // Long after the heartbeat it is still there: its client answers pings.
    let listening = tokio::time::timeout(Duration::from_millis(500), next(&mut socket)).await;
    assert!(listening.is_err(), "{listening:?}");
    let (_, placed) = app.post("/v1/orders", order()).await;
    let told = next_json(&mut socket).await;
    assert_eq!(told["id"], "2", "{told} {placed}");
}

/// Who does not read as fast as events come is told so, each in its interface's words.
#[tokio::test]
async fn who_is_too_slow_is_told_so() {
    let app = TestApp::start_with(|config| {
        without_limit(config);
        config.events.feed = 2.try_into().unwrap();
    })
    .await;
    let mut events = socket(&app, "/v1/events", None).await;
    let mut subscription = socket(&app, "/graphql", Some("graphql-transport-ws")).await;
    for message in [
        json!({ "type": "connection_init" }),
        json!({ "id": "1", "type": "subscribe", "payload": {
            "query": "subscription { orderEvents { id } }" } }),
    ] {
        let message = Message::text(message.to_string());
        subscription.send(message).await.unwrap();
    }
    let mut grpc = orders(&app).await;
    let watch = grpc.watch_orders(pb::WatchOrdersRequest::default());
    let mut stream = watch.await.unwrap().into_inner();

    let closed = async {
        loop {
            if let Message::Close(Some(frame)) = next(&mut events).await.unwrap() {
                break u16::from(frame.code);
            }
        }
    };
    let refused = async {
        loop {
            let said = next_json(&mut subscription).await.to_string();
            if said.contains("TOO_SLOW") {
                break;
            }
        }
    };
    let ended = async {
        loop {
            if let Err(status) = stream.message().await {
                break status.code();
            }
        }
    };
    // Many at once, until nobody could keep up.
    let crowds = async {
        loop {
            let crowd = (0..50).map(|_| app.post("/v1/orders", order()));
            futures_util::future::join_all(crowd).await;
        }
    };
    tokio::select! {
        ends = async { tokio::join!(closed, refused, ended) } => {
            assert_eq!(ends, (1013, (), Code::ResourceExhausted));
        }
        () = crowds => unreachable!("crowds come until all have been told"),
    }
}

/// One client cannot take all places, and pages of other origins get none.
#[tokio::test]
async fn sockets_are_shared_out() {
    let app = TestApp::start_with(|config| {
        config.server.max_sessions_per_client = 2.try_into().unwrap();
        config.server.allowed_origins =
            vec![service::config::Origin("https://shop.example".into())];
    })
    .await;
    let address = format!("ws://{}/v1/events", app.public);
    let by = async |client: &str, origin: Option<&str>| {
        let mut request = address.as_str().into_client_request().unwrap();
        let headers = request.headers_mut();
        headers.insert("x-forwarded-for", client.parse().unwrap());
        if let Some(origin) = origin {
            headers.insert("origin", origin.parse().unwrap());
        }
        connect_async(request).await.map(|(socket, _)| socket)
    };
    let _first = by("1.1.1.1", None).await.unwrap();
    let second = by("1.1.1.1", Some("https://shop.example")).await.unwrap();
    let refused = by("1.1.1.1", None).await.unwrap_err().to_string();
    assert!(refused.contains("503"), "{refused}");
    let _other = by("2.2.2.2", Some(&format!("http://{}", app.public)))
        .await
        .unwrap();
    let refused = by("2.2.2.2", Some("https://evil.example"))
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("403"), "{refused}");
    // A place that is left is free again.
    drop(second);
    let mut tries = 0;
    while by("1.1.1.1", None).await.is_err() {
        tries += 1;
        assert!(tries < 100, "it is never free again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // So it is with those who watch its health.
    let health = HealthClient::new(channel(&app).await);
    let watch = async |client: &'static str| {
        let mut request = Request::new(HealthCheckRequest::default());
        let from = client.parse().unwrap();
        request.metadata_mut().insert("x-forwarded-for", from);
        let watched = health.clone().watch(request).await;
        watched.map(tonic::Response::into_inner)
    };
    let _first = watch("3.3.3.3").await.unwrap();
    let _second = watch("3.3.3.3").await.unwrap();
    let refused = watch("3.3.3.3").await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    let _other = watch("4.4.4.4").await.unwrap();
}

/// A client that does not answer pings is let go.
#[tokio::test]
async fn silent_clients_are_let_go() {
    let app = TestApp::start_with(|config| {
        config.server.heartbeat.0 = Duration::from_millis(100);
        config.server.max_sessions = 1.try_into().unwrap();
    })
    .await;
    // It never reads, so it never answers.
    let silent = socket(&app, "/v1/events", None).await;
    // There is one place, and it is free again once the silent one is gone.
    let address = format!("ws://{}/v1/events", app.public);
    let refused = connect_async(address.as_str())
        .await
        .unwrap_err()
        .to_string();
    assert!(refused.contains("503"), "{refused}");
    let mut tries = 0;
    while connect_async(address.as_str()).await.is_err() {
        tries += 1;
        assert!(tries < 100, "it was never let go");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    drop(silent);
}

/// Thirty fragments, each of which spreads the next one several times.
fn bomb(times: usize) -> String {
    let spread = |i: usize| format!("...A{} ", i + 1).repeat(times);
    let fragments = (0..30).map(|i| format!("fragment A{i} on Query {{ {} }} ", spread(i)));
    fragments.collect::<String>() + "fragment A30 on Query { __typename }"
}

/// What editors and generators of code ask for first: every type, with what it is made of.
fn introspection() -> String {
    let made_of = (0..9).fold("kind name".to_owned(), |inner, _| {
        format!("kind name ofType {{ {inner} }}")
    });
    format!(
        "query {{ __schema {{
           queryType {{ name }} mutationType {{ name }} subscriptionType {{ name }}
           types {{ ...Type }}
           directives {{ name description locations args {{ ...Input }} }} }} }}
         fragment Type on __Type {{
           kind name description
           fields(includeDeprecated: true) {{
             name description args {{ ...Input }} type {{ ...MadeOf }} isDeprecated deprecationReason }}
           inputFields {{ ...Input }}
           interfaces {{ ...MadeOf }}
           enumValues(includeDeprecated: true) {{ name description isDeprecated deprecationReason }}
           possibleTypes {{ ...MadeOf }} }}
         fragment Input on __InputValue {{ name description type {{ ...MadeOf }} defaultValue }}
         fragment MadeOf on __Type {{ {made_of} }}"
    )
}

/// With the limits that the service comes with, tools can ask for its schema. Each field of it that needs
/// no argument is asked for by what was told.
#[tokio::test]
async fn the_schema_can_be_asked_for_and_followed() {
    let app = TestApp::start().await;
    let told = graphql(&app, &introspection(), json!({})).await;
    assert_eq!(told["errors"], Value::Null);
    let types = told["data"]["__schema"]["types"].as_array().unwrap();
    let fields = |name: &str| {
        let found = types.iter().find(|kind| kind["name"] == name).unwrap();
        found["fields"].as_array().unwrap().clone()
    };
    let needed = |field: &Value| {
        let arguments = field["args"].as_array().unwrap();
        arguments.iter().any(|a| a["type"]["kind"] == "NON_NULL")
    };
    let mut names: Vec<_> = [fields("Query"), fields("Mutation")].concat();
    names.retain(|field| !needed(field));
    assert!(!names.is_empty(), "{types:?}");
    for field in &names {
        let query = format!("{{ {} {{ __typename }} }}", field["name"].as_str().unwrap());
        let answer = graphql(&app, &query, json!({})).await;
        assert_eq!(answer["errors"], Value::Null, "{query}");
    }

    let silent = TestApp::start_with(|config| config.graphql.introspection = false).await;
    let told = graphql(&silent, &introspection(), json!({})).await;
    assert_eq!(told["data"]["__schema"], Value::Null, "{told}");
    assert_eq!(silent.get("/graphql/schema").await.0, 404);
}

#[tokio::test]
async fn queries_that_ask_for_too_much_are_refused() {
    let app = TestApp::start_with(|config| {
        config.graphql.max_depth = 3.try_into().unwrap();
        config.graphql.max_complexity = 100.try_into().unwrap();
        config.graphql.max_fields = 50.try_into().unwrap();
    })
    .await;
    let aliases: String = (0..60)
        .map(|i| format!("a{i}: totals(customer: \"ada\") {{ orders }} "))
        .collect();
    for (query, why) in [
        (
            "{ orders(first: 1) { items { items { sku } } } }".to_owned(),
            "too deep",
        ),
        (
            "{ orders(first: 100) { items { id } } }".to_owned(),
            "too complex",
        ),
        (format!("{{ {aliases} }}"), "fields"),
        ("{ a: nothing }".to_owned(), "Unknown field"),
        // Fragments that spread each other: 3^30 fields, were they put in.
        (format!("{{ ...A0 }} {}", bomb(3)), "fields"),
        // The same without a field, and without an end.
        (format!("{{ __typename }} {}", bomb(6)), "fields"),
        (
            "{ ...A } fragment A on Query { ...B } fragment B on Query { ...A }".to_owned(),
            "fields",
        ),
    ] {
        let answer = graphql(&app, &query, json!({})).await;
        let said = answer["errors"][0]["message"].as_str().unwrap();
        assert!(said.contains(why), "{query}: {said}");
        assert_eq!(answer["data"], Value::Null);
    }
    // So deep that whoever reads it by recursion runs out of stack.
    for nested in ["{a", "{a(b:[", "{a(b:{c:"] {
        let answer = graphql(&app, &nested.repeat(60_000 / nested.len()), json!({})).await;
        assert_eq!(
            answer["errors"].as_array().map(Vec::len),
            Some(1),
            "{nested}"
        );
    }
    let (status, problem) = app.post("/graphql", json!({ "query": 1 })).await;
    assert_eq!((status, &problem["type"]), (422, &json!("invalid-request")));
    let huge = "#".repeat(100_000);
    let (status, problem) = app.post("/graphql", json!({ "query": huge })).await;
    assert_eq!((status, &problem["type"]), (413, &json!("too-large")));
    // As a page of another origin could send it without asking.
    let address = format!("http://{}/graphql", app.public);
    let simple = reqwest::Client::new()
        .post(address)
        .header("content-type", "text/plain");
    let simple = simple
        .body(r#"{"query":"{ __typename }"}"#)
        .send()
        .await
        .unwrap();
    assert_eq!(simple.status(), 415);
}

/// Counts the queries for totals of more than one customer, which no other test here makes. (SQLite's
/// are logged by threads of its own, so the whole process is looked at.)
struct Queries(Arc<AtomicUsize>);

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Queries {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        struct Text(bool);
        impl tracing::field::Visit for Text {
            fn record_debug(&mut self, _: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0 |= format!("{value:?}").contains("WHERE customer IN");
            }
        }
        let mut text = Text(false);
        event.record(&mut text);
        if event.metadata().target() == "sqlx::query" && text.0 {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// The totals of all customers of a page are one query.
#[tokio::test]
async fn what_belongs_to_a_page_is_loaded_at_once() {
    let app = TestApp::start().await;
    for i in 0..10 {
        let mut wanted = order();
        wanted["customer"] = json!(format!("customer {i}"));
        assert_eq!(app.post("/v1/orders", wanted).await.0, 201);
    }
    let queries = Arc::new(AtomicUsize::new(0));
    let counting = tracing_subscriber::registry().with(Queries(Arc::clone(&queries)));
    tracing::subscriber::set_global_default(counting).unwrap();
    let query = "{ orders { items { customer customerTotals { orders } } } }";
    let answer = graphql(&app, query, json!({})).await;
    let items = answer["data"]["orders"]["items"].as_array().unwrap();
    assert_eq!(items.len(), 10, "{answer}");
    assert_eq!(queries.load(Ordering::SeqCst), 1);
}

/// Whatever the description allows is done, whatever it does not is refused, nothing fails, and every
/// answer is as described.
#[tokio::test(flavor = "multi_thread")]
async fn the_description_is_kept_to() {
    for database in Database::each().await {
        keeps_to_its_description(database).await;
    }
}

async fn keeps_to_its_description(database: Database) {
    let app = TestApp::start_on(database, |config| {
        without_limit(config);
        let keys = "one:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
        config.database.encryption_keys = Some(keys.parse().unwrap());
    })
    .await;
    let hooks = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/integration/schemathesis.py");
    let dir = tempfile::tempdir().unwrap();
    let run = tokio::process::Command::new("schemathesis")
        .args(["run", &format!("http://{}/openapi.json", app.public)])
        .args(["--max-examples", "50", "--seed", "1", "--no-color"])
        .current_dir(&dir)
        .env("SCHEMATHESIS_HOOKS", hooks)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .await
        .expect("`cargo xtask setup` installs schemathesis, and `cargo xtask ci` finds it");
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{said}");
    // All of them, in more than one way each.
    assert!(said.contains("5 selected / 5 total"), "{said}");
    let tried = said.split("Test cases:").nth(1).unwrap();
    let tried = tried.split_whitespace().next().unwrap();
    assert!(tried.parse::<u32>().unwrap() > 300, "{said}");
}

#[tokio::test]
async fn the_interfaces_describe_themselves() {
    let app = TestApp::start().await;
    let (status, description) = app.get("/openapi.json").await;
    assert_eq!(status, 200);
    assert_eq!(description["openapi"], "3.1.0");
    let paths = description["paths"].as_object().unwrap();
    assert_eq!(
        paths.keys().collect::<Vec<_>>(),
        [
            "/v1/customers/{customer}/totals",
            "/v1/orders",
            "/v1/orders/{id}",
            "/v1/orders/{id}/cancel"
        ]
    );
    let address = |path: &str| format!("http://{}{path}", app.public);
    let page = reqwest::get(address("/docs/")).await.unwrap();
    assert_eq!(page.status(), 200);
    assert!(page.text().await.unwrap().contains("swagger-ui"));
    let schema = reqwest::get(address("/graphql/schema")).await.unwrap();
    let schema = schema.text().await.unwrap();
    assert!(schema.contains("type Subscription"), "{schema}");
}

/// Whoever reads the description can log in on its page, at the provider that the service believes.
#[tokio::test]
async fn the_page_of_the_description_knows_how_to_log_in() {
    let app = TestApp::start_on(Database::sqlite(), |config| {
        config.auth.mode = AuthMode::Jwks;
        config.auth.issuer = "https://login.example/tenant/".to_owned();
        config.auth.audience = "https://orders.example".to_owned();
        config.auth.client_id = Some("page".to_owned());
    })
    .await;
    let (_, description) = app.get("/openapi.json").await;
    assert_eq!(description["security"], json!([{ "token": [] }]));
    // The provider has not answered, so clients are told where to ask it themselves.
    let wanted = json!({
        "type": "openIdConnect",
        "openIdConnectUrl": "https://login.example/tenant/.well-known/openid-configuration",
    });
    assert_eq!(
        description["components"]["securitySchemes"]["token"],
        wanted
    );
    let page = |file: &str| reqwest::get(format!("http://{}/docs/{file}", app.public));
    let setup = page("swagger-initializer.js").await.unwrap();
    let policy = setup.headers()["content-security-policy"].to_str().unwrap();
    let may_ask = "connect-src 'self' https: ";
    assert!(policy.contains(may_ask), "{policy}");
    let login = app.page_login().await;
    assert_eq!(login["clientId"], "page");
    assert_eq!(login["usePkceWithAuthorizationCodeGrant"], true);
    let resource = &login["additionalQueryStringParams"]["resource"];
    assert_eq!(resource, "https://orders.example");
    // Where the provider sends its readers back to; the policy lets no script but files run.
    let back = page("oauth2-redirect.html").await.unwrap();
    assert_eq!(back.status(), 200);
    let back = back.text().await.unwrap();
    assert!(
        back.contains("<script src=\"oauth2-redirect.js\">"),
        "{back}"
    );
    assert_eq!(page("oauth2-redirect.js").await.unwrap().status(), 200);
}
