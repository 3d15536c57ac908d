// Package dns stands in for lego's, which brings the clients of 180 providers of DNS: most of
// what a build of Traefik compiles, and nothing that a gateway without ACME calls.
package dns

import (
	"fmt"

	"github.com/go-acme/lego/v4/challenge"
)

// NewDNSChallengeProviderByName knows none.
func NewDNSChallengeProviderByName(name string) (challenge.Provider, error) {
	return nil, fmt.Errorf("this Traefik is built without DNS challenges, so without %q", name)
}
