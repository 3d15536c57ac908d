package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"flag"
	"log"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// A cluster lives for a test or a day; its certificates somewhat longer.
const validFor = 365 * 24 * time.Hour

// authority signs certificates and keeps them, with their keys, as NAME.crt and NAME.key.
type authority struct {
	dir  string
	name string
	cert *x509.Certificate
	key  crypto.Signer
}

// writePKI makes the keys and certificates of a cluster, and a kubeconfig for each of its parts and
// for its administrator. https://kubernetes.io/docs/setup/best-practices/certificates/
func writePKI() {
	flags := flag.NewFlagSet("pki", flag.ExitOnError)
	dir := flags.String("dir", "pki", "where to write")
	server := flags.String("server", "", "the API server's address, for the kubeconfigs")
	node := flags.String("node", "", "the node's name")
	names := flags.String("names", "", "the API server's addresses and names, separated by commas")
	check(flags.Parse(os.Args[1:]))
	check(os.MkdirAll(*dir, 0o700))

	cluster := newAuthority(*dir, "ca", "kubernetes-ca")
	front := newAuthority(*dir, "front-proxy-ca", "front-proxy-ca")
	api := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "kube-apiserver"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames: []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
			"kubernetes.default.svc.cluster.local"},
	}
	for _, name := range strings.Split(*names, ",") {
		if address := net.ParseIP(name); address != nil {
			api.IPAddresses = append(api.IPAddresses, address)
		} else {
			api.DNSNames = append(api.DNSNames, name)
		}
	}
	cluster.sign("apiserver", api)
	cluster.sign("apiserver-kubelet-client", client("kube-apiserver-kubelet-client", "system:masters"))
	front.sign("front-proxy-client", client("front-proxy-client"))

	tokens := newKey(*dir, "sa")
	public, err := x509.MarshalPKIXPublicKey(tokens.Public())
	check(err)
	write(*dir, "sa.pub", "PUBLIC KEY", public, 0o644)

	users := map[string]*x509.Certificate{
		"admin":              client("kubernetes-admin", "system:masters"),
		"controller-manager": client("system:kube-controller-manager"),
		"scheduler":          client("system:kube-scheduler"),
		"proxy":              client("system:kube-proxy"),
		"kubelet":            client("system:node:"+*node, "system:nodes"),
	}
	for name, certificate := range users {
		cluster.sign(name, certificate)
		writeKubeconfig(*dir, name, *server)
	}
}

func newAuthority(dir, name, commonName string) *authority {
	certificate := &x509.Certificate{
		Subject:               pkix.Name{CommonName: commonName},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	own := &authority{dir: dir, name: name, cert: certificate, key: newKey(dir, name)}
	own.cert = own.issue(name, certificate, own.key.Public())
	return own
}

func client(commonName string, groups ...string) *x509.Certificate {
	return &x509.Certificate{
		Subject:     pkix.Name{CommonName: commonName, Organization: groups},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
}

func (a *authority) sign(name string, certificate *x509.Certificate) {
	a.issue(name, certificate, newKey(a.dir, name).Public())
}

func (a *authority) issue(name string, certificate *x509.Certificate, key crypto.PublicKey) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	check(err)
	certificate.SerialNumber = serial
	certificate.NotBefore = time.Now().Add(-time.Hour)
	certificate.NotAfter = time.Now().Add(validFor)
	der, err := x509.CreateCertificate(rand.Reader, certificate, a.cert, key, a.key)
	check(err)
	write(a.dir, name+".crt", "CERTIFICATE", der, 0o644)
	parsed, err := x509.ParseCertificate(der)
	check(err)
	return parsed
}

func newKey(dir, name string) crypto.Signer {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	der, err := x509.MarshalECPrivateKey(key)
	check(err)
	write(dir, name+".key", "EC PRIVATE KEY", der, 0o600)
	return key
}

func write(dir, name, kind string, der []byte, mode os.FileMode) {
	text := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	check(os.WriteFile(filepath.Join(dir, name), text, mode))
}

func writeKubeconfig(dir, name, server string) {
	read := func(file string) []byte {
		text, err := os.ReadFile(filepath.Join(dir, file))
		check(err)
		return text
	}
	config := api.NewConfig()
	config.Clusters["xtask"] = &api.Cluster{Server: server, CertificateAuthorityData: read("ca.crt")}
	config.AuthInfos[name] = &api.AuthInfo{
		ClientCertificateData: read(name + ".crt"),
		ClientKeyData:         read(name + ".key"),
	}
	config.Contexts["xtask"] = &api.Context{Cluster: "xtask", AuthInfo: name}
	config.CurrentContext = "xtask"
	check(clientcmd.WriteToFile(*config, filepath.Join(dir, name+".kubeconfig")))
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
